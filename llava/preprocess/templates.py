"""The sixteen conversation templates of the original LLaVA code (conversation.py at c121f04)."""

from dataclasses import replace

from llava.preprocess.conversation import Style, Template, Turn

_HUMAN = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
_USER = _HUMAN.replace("human", "user")
_MMTAG = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant is able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
    "The visual content will be provided with the following format: <Image>visual content</Image>."
)
_LLAVA_LLAMA_2 = (
    "You are a helpful language and vision assistant. "
    "You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)
_MPT = "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers."
_LLAMA_2 = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while "
    "being safe.  Your answers should not include any harmful, unethical, racist, sexist, toxic, "
    "dangerous, or illegal content. Please ensure that your responses are socially unbiased and positive "
    "in nature.\n"
    "\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of "
    "answering something not correct. If you don't know the answer to a question, please don't share "
    "false information."
)
_FEW_SHOT = (
    Turn("user", "What are the key differences between renewable and non-renewable energy sources?"),
    Turn(
        "assistant",
        "Renewable energy sources are those that can be replenished naturally in a relatively short amount "
        "of time, such as solar, wind, hydro, geothermal, and biomass. Non-renewable energy sources, on the "
        "other hand, are finite and will eventually be depleted, such as coal, oil, and natural gas. Here "
        "are some key differences between renewable and non-renewable energy sources:\n"
        "1. Availability: Renewable energy sources are virtually inexhaustible, while non-renewable energy "
        "sources are finite and will eventually run out.\n"
        "2. Environmental impact: Renewable energy sources have a much lower environmental impact than "
        "non-renewable sources, which can lead to air and water pollution, greenhouse gas emissions, and "
        "other negative effects.\n"
        "3. Cost: Renewable energy sources can be more expensive to initially set up, but they typically "
        "have lower operational costs than non-renewable sources.\n"
        "4. Reliability: Renewable energy sources are often more reliable and can be used in more remote "
        "locations than non-renewable sources.\n"
        "5. Flexibility: Renewable energy sources are often more flexible and can be adapted to different "
        "situations and needs, while non-renewable sources are more rigid and inflexible.\n"
        "6. Sustainability: Renewable energy sources are more sustainable over the long term, while "
        "non-renewable sources are not, and their depletion can lead to economic and social instability.\n",
    ),
)


def _single(system: str, few_shot: tuple[Turn, ...] = ()) -> Template:
    return Template(
        style=Style.SINGLE, user="Human", assistant="Assistant", sep="###", system=system, few_shot=few_shot
    )


def _two(system: str) -> Template:
    return Template(style=Style.TWO, user="USER", assistant="ASSISTANT", sep=" ", sep2="</s>", system=system)


def _chatml(system: str) -> Template:
    return Template(
        style=Style.MPT,
        user="<|im_start|>user\n",
        assistant="<|im_start|>assistant\n",
        sep="<|im_end|>",
        system_role="<|im_start|>system\n",
        system=system,
    )


def _llama_2(system: str, sep: str = "<s>") -> Template:
    return Template(style=Style.LLAMA_2, user="USER", assistant="ASSISTANT", sep=sep, sep2="</s>", system=system)


_V0 = _single(_HUMAN, _FEW_SHOT)
_VICUNA_V1 = _two(_USER)
_DIRECT = _chatml("Answer the questions.")
_PLAIN = Template(style=Style.PLAIN, user="", assistant="", sep="\n")

TEMPLATES: dict[str, Template] = {
    "default": _V0,
    "v0": _V0,
    "v1": _VICUNA_V1,
    "vicuna_v1": _VICUNA_V1,
    "llama_2": _llama_2(_LLAMA_2),
    "mistral_instruct": _llama_2("", sep=""),
    "chatml_direct": _DIRECT,
    "mistral_direct": _DIRECT,
    "plain": _PLAIN,
    "v0_plain": _PLAIN,
    "llava_v0": _single(_HUMAN),
    "v0_mmtag": replace(_single(_MMTAG), tagged=True),
    "llava_v1": _two(_HUMAN),
    "v1_mmtag": replace(_two(_MMTAG), tagged=True),
    "llava_llama_2": _llama_2(_LLAVA_LLAMA_2),
    "mpt": _chatml(_MPT),
}
