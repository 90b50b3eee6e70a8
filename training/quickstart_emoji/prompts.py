"""Twelve prompts that a person might type, each with the words that count as right: an emoji counts whose name or
keywords have one of them. They were written down before the first run of the quickstart that trained a whole model."""

PROMPTS = {
    "a slice of pizza": ("pizza",),
    "I love you": ("love", "heart"),
    "a cat": ("cat",),
    "happy birthday!": ("birthday", "cake", "party", "celebration"),
    "it is raining outside": ("rain",),
    "the moon at night": ("moon",),
    "something to eat for dessert": ("dessert", "cake", "sweet", "chocolate"),
    "a fast train": ("train", "railway", "shinkansen"),
    "let's play football": ("football", "soccer", "ball"),
    "a musical instrument": ("instrument", "music", "musical"),
    "an animal that lives in the sea": ("sea", "ocean", "fish", "whale", "dolphin", "shark", "crab", "octopus"),
    "I am so angry": ("angry", "mad", "rage"),
}
