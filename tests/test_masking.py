"""Which tokens are trained on, token by token."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rwkv_peft.config import DataConfig
from rwkv_peft.data.examples import segments_of
from rwkv_peft.data.masking import Encoder, between, encoder_for, starts_of
from rwkv_peft.data.templates import Segment, find_template
from rwkv_peft.data.tokenizer import Tokenizer
from rwkv_peft.errors import ConfigError, DataError

BYTE, WORLD = Tokenizer.byte(), Tokenizer.world()


def shown(value: Any, tokenizer: Tokenizer = BYTE, **settings: Any) -> str:
    """The text of an example, what is learnt in brackets; ∅ is token 0, ⊠ the token of U+0017."""
    config = DataConfig(["d"], **settings)
    template = find_template(config.template)
    encoder = encoder_for(config, tokenizer, template)
    [segments] = segments_of(value, config.fields, template, config.stop_token is not None)
    encoded = encoder.encode(segments)
    text, inside = "", False
    for index, target in zip(encoded.ids.tolist(), encoded.target.tolist(), strict=True):
        text += ("[" if target else "]") if target != inside else ""
        inside = target
        text += "∅" if index == 0 else tokenizer.decode([index]).replace("\n", "⏎").replace("\x17", "⊠")
    assert encoded.targets == encoded.target.sum()
    return text + "]" * inside


CHAT = {
    "messages": [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "Say User:\n\nAssistant: no"},
        {"role": "assistant", "content": "User: A\n\nAssistant: B"},
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": "C\x17D"},
    ]
}
PAIR = {"prompt": "Q", "response": "A"}
HEAD = "System: S⏎⏎User: Say User:⏎Assistant: no⏎⏎Assistant:"


@pytest.mark.parametrize(
    ("value", "settings", "expected"),
    [
        (CHAT, {}, f"{HEAD}[ User: A⏎⏎Assistant: B⏎⏎]User: Q⏎⏎Assistant:[ C⊠D∅]"),
        (CHAT, {"mask": "answers"}, f"{HEAD}[ User: A⏎⏎Assistant: B⏎⏎]User: Q⏎⏎Assistant:[ C⊠D∅]"),
        (CHAT, {"mask": "last"}, f"{HEAD} User: A⏎⏎Assistant: B⏎⏎User: Q⏎⏎Assistant:[ C⊠D∅]"),
        (CHAT, {"mask": "all"}, f"S[{HEAD[1:]} User: A⏎⏎Assistant: B⏎⏎User: Q⏎⏎Assistant: C⊠D∅]"),
        (CHAT, {"mask": "pad"}, f"S[{HEAD[1:]} User: A⏎⏎Assistant: B⏎⏎User: Q⏎⏎Assistant: C⊠D∅]"),
        # the original's way looks for the words, wherever they stand
        (CHAT, {"mask": "qa"}, "System: S⏎⏎User: Say User:⏎[Assistant: no⏎⏎Assistant: ]User: A⏎⏎[Assistant: B⏎⏎]"
                               "User: Q⏎⏎[Assistant: C⊠D∅]"),
        (CHAT, {"mask": "se", "mask_id": '{"mask0": "Q", "mask1": "S"}'},
         "S[ystem: S⏎⏎User: Say User:⏎Assistant: no⏎⏎Assistant: User: A⏎⏎Assistant: B⏎⏎User: ]Q⏎⏎Assistant: C⊠D∅"),
        (CHAT, {"mask": "se", "mask_id": '{"mask0": "Q", "mask1": "Assistant: B"}'},
         f"{HEAD} User: A⏎⏎[Assistant: B⏎⏎User: ]Q⏎⏎Assistant: C⊠D∅"),
        # a stop token of one's own ends every answer; inside the text it is text
        (CHAT, {"stop_token": r"\x17"}, f"{HEAD}[ User: A⏎⏎Assistant: B⊠]⏎⏎User: Q⏎⏎Assistant:[ C⊠D⊠]"),
        (CHAT, {"stop_token": "24", "mask": "last"}, f"{HEAD} User: A⏎⏎Assistant: B⊠⏎⏎User: Q⏎⏎Assistant:[ C⊠D⊠]"),
        (PAIR, {"template": "instruction"},
         "Below is an instruction that describes a task. Write a response that appropriately completes the request.⏎⏎"
         "### Instruction:⏎Q⏎⏎### Response:[A⏎⊠]"),
        (PAIR, {"template": "raw"}, "Q[A∅]"),
        (PAIR, {"template": "g1-fake-think"}, "User: Q⏎⏎Assistant: <think>⏎</think[>⏎A∅]"),
        ({"text": "abc"}, {}, "a[bc∅]"),
        ({"text": "abc"}, {"stop_token": "24"}, "a[bc∅]"),  # which is for answers
        ({"text": "User: a\n\nAssistant: b\n\nUser: c"}, {"mask": "qa"}, "User: a⏎⏎[Assistant: b⏎⏎]User: c∅"),
        ({"text": "no marks"}, {"mask": "qa"}, "n[o marks∅]"),
    ],
)  # fmt: skip
def test_what_is_learnt(value: Any, settings: dict[str, Any], expected: str) -> None:
    assert shown(value, **settings) == expected


def test_world_tokens_do_not_cross_from_prompt_to_answer() -> None:
    [segments] = segments_of({"prompt": "Hi there", "response": "Fine\n\nthanks"}, None, find_template("rwkv"))
    encoded = Encoder(WORLD, "auto", 0).encode(segments)
    assert [WORLD.decode([index]) for index in encoded.ids[~encoded.target]] == [
        "User", ":", " Hi", " there", "\n\n", "Ass", "istant", ":",
    ]  # fmt: skip
    assert [WORLD.decode([index]) for index in encoded.ids[encoded.target]] == [" Fine", "\n\n", "thanks", ""]
    assert (encoded.ids.dtype, encoded.target.dtype, encoded.inputs, encoded.targets) == (np.int32, np.bool_, 11, 4)


def test_qa_in_world_tokens() -> None:
    assert shown({"text": "User: hi\n\nAssistant: yes\n\nUser: no"}, WORLD, mask="qa") == (
        "User: hi⏎⏎[Assistant: yes⏎⏎]User: no∅"
    )


def slowly_between(ids: list[int], masked: list[int], trained: list[int]) -> list[bool]:
    """As the original loops over them."""
    state, found = False, []
    for i in range(len(ids)):
        if ids[i : i + len(masked)] == masked:
            state = False
        elif ids[i : i + len(trained)] == trained:
            state = True
        found.append(state)
    return found


marks = st.lists(st.integers(0, 2), min_size=1, max_size=3)


@given(ids=st.lists(st.integers(0, 2), max_size=40), masked=marks, trained=marks)
def test_between_is_the_originals_loop(ids: list[int], masked: list[int], trained: list[int]) -> None:
    got = between(np.array(ids, np.int32), np.array(masked), np.array(trained))
    assert got.tolist() == slowly_between(ids, masked, trained)


@given(ids=st.lists(st.integers(0, 2), max_size=20), mark=marks)
def test_starts_of(ids: list[int], mark: list[int]) -> None:
    wanted = [ids[i : i + len(mark)] == mark for i in range(len(ids))]
    assert starts_of(np.array(ids, np.uint16), np.array(mark)).tolist() == wanted


def test_what_should_be_told() -> None:
    encoder = Encoder(BYTE, "qa", 24, ("User:", "Assistant:"))
    encoder.encode([Segment("nothing", True, True)])
    encoder.encode([Segment("Assistant:", False), Segment("a\x17b", True, True)])
    assert encoder.notes() == [
        "1 examples without 'Assistant:': trained on whole",
        "1 texts hold the stop token, where the model learns to stop",
    ]


@pytest.mark.parametrize("segments", [[Segment("Q", False), Segment("", True, True)], [Segment("", True, True)]])
def test_an_example_without_targets(segments: list[Segment]) -> None:
    with pytest.raises(DataError, match=r"^no answer tokens: "):
        Encoder(BYTE, "auto", 0).encode(segments)


@pytest.mark.parametrize("mask", ["answers", "last"])
def test_plain_text_has_no_answers(mask: Any) -> None:
    with pytest.raises(DataError, match=rf"^plain text has no answers: not with --mask {mask}; choose auto or all"):
        Encoder(BYTE, mask, 0).encode([Segment("text", True, True)])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mask_id": '{"mask0": "a", "mask1": "b"}'}, "--mask-id: only with --mask qa or se, not auto"),
        ({"mask": "se", "mask_id": "{"}, "--mask-id {: must be JSON of two texts"),
        ({"mask": "se", "mask_id": '{"mask0": "a"}'}, "--mask-id .*: must be JSON of two texts"),
        ({"mask": "se", "mask_id": '{"mask0": "a", "mask1": ""}'}, "--mask-id .*: must be JSON of two texts"),
        ({"mask": "se", "mask_id": '{"mask0": "a", "mask1": 3}'}, "--mask-id .*: must be JSON of two texts"),
        ({"data": []}, "--data: got no file"),
        ({"ctx_len": 0}, "--ctx-len 0: must be at least 1"),
        ({"special_tokens": ("a", "a")}, "--special-tokens: must be different texts"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        DataConfig(**{"data": ["d"], **settings}).check_data()
