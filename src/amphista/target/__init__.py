"""The frozen causal LM: loading, specification, masks, forward, text."""

DEFAULT_TARGET = "smollm2-135m-instruct"
