"""A conversation in the terminal."""

from __future__ import annotations

import sys
from dataclasses import replace

from .config import ChatConfig, SamplingConfig
from .data.templates import Message, Segment, Template, find_template, template_of
from .errors import DataError
from .inference import Session, open_session

LABEL = "Assistant:"
STOP = "\n\nUser:"  # the model goes on with the other's turn
HELP = "Type to talk; /reset begins anew, /exit or Ctrl-D ends."


class Conversation:
    """What was said so far; the session has read it as it stands in training."""

    def __init__(self, session: Session, template: Template, system: str, every_turn: bool) -> None:
        self.session, self.template, self.every_turn = session, template, every_turn
        self.first = [Message("system", system)] if system else []
        self.reset()
        template.prompt_segments([*self.first, Message("user", "")], every_turn)  # says now what cannot be written

    def reset(self) -> None:
        """Begin anew."""
        self.messages = list(self.first)
        self.segments: list[Segment] = []
        self.state = self.session.start

    def ask(self, text: str) -> None:
        """Let the session read the user's next message; of what it has read before, only what is new."""
        if self.template.single_turn:
            self.reset()
        self.messages.append(Message("user", text))
        segments = self.template.prompt_segments(self.messages, self.every_turn)
        known = len(self.segments)
        if segments[:known] != self.segments:
            known, self.state = 0, self.session.start
        self.session.state = self.state  # without the stop text, which the model may have begun to write
        for segment in segments[known:]:
            ids = self.session.tokenizer.encode(segment.text) + [self.session.stop_token] * segment.ends
            if ids:
                self.session.read(ids)
        self.segments, self.state = segments, self.session.state

    def reply(self, sampling: SamplingConfig) -> str:
        """Print the answer, and remember it."""
        _, label, begun = self.segments[-1].text.rpartition(LABEL)
        sys.stdout.write(label + begun if label and "\n\n" not in begun else LABEL)
        pieces = []
        for piece in self.session.write(sampling):
            sys.stdout.write(piece)
            sys.stdout.flush()
            pieces.append(piece)
        sys.stdout.write("\n\n")
        message = self.template.reply("".join(pieces))
        if message.content.strip():
            self.messages.append(message)
        if message.content.strip() and not self.template.single_turn:
            try:
                self.template.prompt_segments([*self.messages, Message("user", "")], self.every_turn)
            except DataError as error:
                print(f"(this cannot be gone on from: {error}; begun anew)\n")
                self.reset()
        return message.content


def run_chat(config: ChatConfig) -> None:
    """Read a line, answer it, and so on until the input ends."""
    template = None if config.template is None else find_template(config.template)
    session = open_session(config)
    form = session.model.form
    template = template or template_of(form)
    has_own_stop = (form.stop_token if config.stop_token is None else config.stop_token) is not None
    if not has_own_stop and template.stop is not None:
        session.stop_token = session.tokenizer.stop_id(template.stop)
    sampling = replace(config.sampling, stop=config.sampling.stop or (STOP,))
    conversation = Conversation(session, template, config.system, has_own_stop)
    print(HELP)
    while (line := _ask()) is not None:
        if line == "/reset":
            conversation.reset()
            print("(begun anew)")
        elif line:
            conversation.ask(line)
            conversation.reply(sampling)


def _ask() -> str | None:
    try:
        line = input("User: ").strip()
    except EOFError:
        print()
        return None
    return None if line == "/exit" else line
