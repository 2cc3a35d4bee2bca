"""A conversation in the terminal."""

from __future__ import annotations

import sys
from dataclasses import replace

from .config import ChatConfig, SamplingConfig
from .data.chat import render_prompt
from .inference import Session, open_session

STOP = "\n\nUser:"  # the model goes on with the other's turn
HELP = "Type to talk; /reset begins anew, /exit or Ctrl-D ends."


def run_chat(config: ChatConfig) -> None:
    """Read a line, answer it, and so on until the input ends."""
    session = open_session(config)
    sampling = replace(config.sampling, stop=config.sampling.stop or (STOP,))
    print(HELP)
    first = True
    while (line := _ask()) is not None:
        if line == "/reset":
            session.state, first = session.start, True
            print("(begun anew)")
        elif line:
            messages = [("system", config.system)] if first and config.system else []
            reply(session, render_prompt([*messages, ("user", line)]), sampling)
            first = False


def reply(session: Session, prompt: str, sampling: SamplingConfig) -> str:
    """Print the answer to `prompt`, and leave the session as if it had read both, as in training."""
    session.read(session.tokenizer.encode(prompt))
    before = session.state
    sys.stdout.write("Assistant:")
    pieces = []
    for piece in session.write(sampling):
        sys.stdout.write(piece)
        sys.stdout.flush()
        pieces.append(piece)
    sys.stdout.write("\n\n")
    answer = "".join(pieces)
    session.state = before  # without the stop text, which the model may have begun to write
    session.read(session.tokenizer.encode(f" {answer.strip()}\n\n"))
    return answer


def _ask() -> str | None:
    try:
        line = input("User: ").strip()
    except EOFError:
        print()
        return None
    return None if line == "/exit" else line
