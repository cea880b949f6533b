"""A small byte-level BPE tokenizer in a folder, trained here, for the tests of texts that are not bytes."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TOKENS = 400
END = "<end>"


def save_tokenizer(
    folder: Path, *, end: str | None = END, text: str = "the quick brown fox jumps. " * 9
) -> Path:
    """The folder, which transformers' AutoTokenizer loads."""
    rules = Tokenizer(models.BPE())
    rules.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rules.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENS, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    rules.train_from_iterator([text], trainer)
    PreTrainedTokenizerFast(tokenizer_object=rules, eos_token=end).save_pretrained(folder)
    return folder
