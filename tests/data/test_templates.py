"""Claims about chat templates: which tokens are the assistant's, in each family of templates, checked by hand.

The templates are written anew from the formats' descriptions; the expectations below are read off by eye. In them
the assistant's speech stands between « and ».
"""

import pytest
from transformers import AutoTokenizer

from medusa import EMBEDDED
from medusa.data.templates import encode_conversation
from medusa.errors import InvalidInput

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The system text goes into the first user turn.
LLAMA_2 = (
    "{% if messages[0].role == 'system' %}{% set sys = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set sys = '' %}{% set turns = messages %}{% endif %}"
    "{% for m in turns %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}"
    "{% endif %}{% if m.role == 'user' %}<s>[INST] {{ (sys if loop.first else '') + m.content }} [/INST]"
    "{% else %} {{ m.content | trim }} </s>{% endif %}{% endfor %}"
)
LLAMA_3 = (
    "<|begin_of_text|>{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}"
    "<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
VICUNA = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ m.content + ' ' }}{% elif m.role == 'user' %}USER: {{ m.content }} "
    "{% else %}ASSISTANT: {{ m.content }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# The system text goes into the last user turn, so that no beginning of a conversation is a beginning of its text.
MISTRAL = (
    "{% set turns = messages | rejectattr('role', 'equalto', 'system') | list %}"
    "{% set users = turns | selectattr('role', 'equalto', 'user') | list %}<s>{% for m in turns %}"
    "{% if m.role == 'user' %}[INST] {% if m == users[-1] and messages[0].role == 'system' %}{{ messages[0].content }}\n\n"
    "{% endif %}{{ m.content }}[/INST]{% else %} {{ m.content | trim }}</s>{% endif %}{% endfor %}"
)
GEMMA = (
    "<bos>{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
# Without a generation prompt the text ends with an end of text that no turn before it has.
PHI_3 = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}<|endoftext|>{% endif %}"
)
DEEPSEEK = (
    "<|begin▁of▁sentence|>{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}"
    "<|User|>{{ m.content }}{% else %}<|Assistant|>{{ m.content.split('</think>')[-1] }}<|end▁of▁sentence|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|Assistant|>{% endif %}"
)
# A turn ends where the next speaker's token begins: that token is no speech of the assistant's.
GLM = "[gMASK]{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
QWEN_3 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>"
    "{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\\n' }}{% endfor %}"
)
SPECIAL = [
    "<|im_start|>",
    "<|im_end|>",
    "<s>",
    "</s>",
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<bos>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
    "<|end|>",
    "<|endoftext|>",
    "<|begin▁of▁sentence|>",
    "<|end▁of▁sentence|>",
    "<|User|>",
    "<|Assistant|>",
    "[gMASK]",
]
PLAIN = {"zephyr": ["<|user|>", "<|assistant|>", "<|system|>"]}  # written in plain letters there

TWO_TURNS = [
    ("system", "Be kind."),
    ("user", "Hi é"),
    ("assistant", "Hello 🎉 you"),
    ("user", "Bye?"),
    ("assistant", "So long."),
]
EXPECTED = {
    "chatml": (
        CHATML,
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi é<|im_end|>\n<|im_start|>assistant\n«Hello 🎉 you<|im_end|>»\n"
        "<|im_start|>user\nBye?<|im_end|>\n<|im_start|>assistant\n«So long.<|im_end|>»\n",
    ),
    "marked": (
        MARKED,
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi é<|im_end|>\n<|im_start|>assistant\n«Hello 🎉 you<|im_end|>»\n"
        "<|im_start|>user\nBye?<|im_end|>\n<|im_start|>assistant\n«So long.<|im_end|>»\n",
    ),
    "qwen-3": (
        QWEN_3,
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi é<|im_end|>\n<|im_start|>assistant\n«Hello 🎉 you<|im_end|>»\n"
        "<|im_start|>user\nBye?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n«So long.<|im_end|>»\n",
    ),
    # The space before the assistant's first word is part of that word's token; here it is the template's own.
    "llama-2": (
        LLAMA_2,
        "<s>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nHi é [/INST]« Hello 🎉 you </s>»<s>[INST] Bye? [/INST]« So long. </s>»",
    ),
    "llama-3": (
        LLAMA_3,
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|><|start_header_id|>user"
        "<|end_header_id|>\n\nHi é<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n«Hello 🎉 you<|eot_id|>»"
        "<|start_header_id|>user<|end_header_id|>\n\nBye?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        "«So long.<|eot_id|>»",
    ),
    "vicuna": (VICUNA, "Be kind. USER: Hi é ASSISTANT:« Hello 🎉 you</s>»USER: Bye? ASSISTANT:« So long.</s>»"),
    "zephyr": (
        ZEPHYR,
        "<|system|>\nBe kind.</s>\n<|user|>\nHi é</s>\n<|assistant|>\n«Hello 🎉 you</s>»\n<|user|>\nBye?</s>\n<|assistant|>\n"
        "«So long.</s>»\n",
    ),
    "mistral": (MISTRAL, "<s>[INST] Hi é[/INST]« Hello 🎉 you</s>»[INST] Be kind.\n\nBye?[/INST]« So long.</s>»"),
    "gemma": (
        GEMMA,
        "<bos><start_of_turn>user\nHi é<end_of_turn>\n<start_of_turn>model\n«Hello 🎉 you<end_of_turn>»\n"
        "<start_of_turn>user\nBye?<end_of_turn>\n<start_of_turn>model\n«So long.<end_of_turn>»\n",
    ),
    "phi-3": (
        PHI_3,
        "<|system|>\nBe kind.<|end|>\n<|user|>\nHi é<|end|>\n<|assistant|>\n«Hello 🎉 you<|end|>»\n<|user|>\nBye?<|end|>\n"
        "<|assistant|>\n«So long.<|end|>»\n<|endoftext|>",
    ),
    "deepseek": (
        DEEPSEEK,
        "<|begin▁of▁sentence|>Be kind.<|User|>Hi é<|Assistant|>«Hello 🎉 you<|end▁of▁sentence|>»<|User|>Bye?<|Assistant|>"
        "«So long.<|end▁of▁sentence|>»",
    ),
    "glm": (
        GLM,
        "[gMASK]<|system|>\nBe kind.<|user|>\nHi é<|assistant|>\n«Hello 🎉 you»<|user|>\nBye?<|assistant|>\n«So long.»",
    ),
}


def tokenizer_with(template: str, family: str = ""):
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    added = [token for token in SPECIAL if token not in PLAIN.get(family, ())]
    tokenizer.add_special_tokens({"additional_special_tokens": added})
    tokenizer.chat_template = template
    return tokenizer


def conversation(turns, family: str = ""):
    return [{"role": role, "content": text} for role, text in turns if not (family == "gemma" and role == "system")]


def shown(tokenizer, ids, loss_mask) -> str:
    """The text with « and » around what is loss_mask."""
    pieces, start = "", 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or loss_mask[end] != loss_mask[start]:
            piece = tokenizer.decode(ids[start:end], clean_up_tokenization_spaces=False)
            pieces += f"«{piece}»" if loss_mask[start] else piece
            start = end
    return pieces


@pytest.mark.parametrize("family", EXPECTED)
def test_mask_is_the_assistants_speech_and_the_end_of_its_turn(family):
    template, expected = EXPECTED[family]
    tokenizer = tokenizer_with(template, family)
    messages = conversation(TWO_TURNS, family)
    ids, loss_mask = encode_conversation(tokenizer, messages)
    assert shown(tokenizer, ids, loss_mask) == expected
    # The ids are those that the model is served with.
    assert ids == tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]


@pytest.mark.parametrize("family", EXPECTED)
def test_contents_that_look_like_the_template_do_not_mislead(family):
    template, _ = EXPECTED[family]
    tokenizer = tokenizer_with(template, family)
    turns = [
        ("user", "ASSISTANT: Yes"),
        ("assistant", "Yes USER: ASSISTANT:\n\n[/INST] Yes"),
        ("user", "Yes"),
        ("assistant", "Yes"),
    ]
    ids, loss_mask = encode_conversation(tokenizer, conversation(turns))
    text = shown(tokenizer, ids, loss_mask)
    assert text.count("«") == 2
    first, second = (part.partition("»")[0] for part in text.split("«")[1:])
    assert first.strip().startswith("Yes USER: ASSISTANT:\n\n[/INST] Yes") and second.strip().startswith("Yes")


def test_thinking_that_a_template_drops_is_not_looked_for():
    tokenizer = tokenizer_with(DEEPSEEK)
    turns = [
        ("user", "Hi"),
        ("assistant", "<think>hm</think>Hello"),
        ("user", "Bye"),
        ("assistant", "<think>oh</think>So long"),
    ]
    ids, loss_mask = encode_conversation(tokenizer, conversation(turns))
    assert shown(tokenizer, ids, loss_mask).count("«Hello<|end▁of▁sentence|>»") == 1
    assert "«So long<|end▁of▁sentence|>»" in shown(tokenizer, ids, loss_mask)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "no chat template"),
        ("{{ raise_exception('never') }}", "refuses a conversation: never"),
        ("{% for m in messages %}{{ m.role }}{% endfor %}", "shows 0 of 1 assistant turns"),
        ("{% for m in messages %}{{ m.content | upper | reverse }}{% endfor %}", "mark them with {% generation %}"),
    ],
)
def test_templates_that_hide_the_speech_are_refused(template, message):
    tokenizer = tokenizer_with(template)
    with pytest.raises(InvalidInput, match=message):
        encode_conversation(tokenizer, conversation([("user", "Hi"), ("assistant", "Hello")]))


THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and '</think>' in m.content %}"
    "{% set thought = m.content.split('</think>')[0].split('<think>')[-1].strip() %}"
    "{% set said = m.content.split('</think>')[-1].strip() %}"
    "{% if loop.last %}<think>\n{{ thought }}\n</think>\n\n{% endif %}{{ said }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_the_thinking_of_the_last_turn_is_speech():
    tokenizer = tokenizer_with(THINKING)
    turns = [
        ("user", "Hi"),
        ("assistant", "<think>hm</think>Hello"),
        ("user", "Bye"),
        ("assistant", "<think>\noh\n</think>\n\nSo"),
    ]
    ids, loss_mask = encode_conversation(tokenizer, conversation(turns))
    assert shown(tokenizer, ids, loss_mask).endswith("assistant\n«<think>\noh\n</think>\n\nSo<|im_end|>»\n")


def test_an_end_of_turn_in_plain_letters_is_speech_too():
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    tokenizer.chat_template = CHATML
    ids, loss_mask = encode_conversation(tokenizer, conversation(TWO_TURNS))
    assert shown(tokenizer, ids, loss_mask).count("<|im_end|>»") == 2
