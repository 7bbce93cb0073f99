"""The tokenizers of T5 and XLM-R, from a folder in transformers' layout with a model of sentencepiece."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dreambooth_ms.errors import ConfigError, WeightError
from dreambooth_ms.formats.clip_tokenizer import ClipTokenizer


class SentencePieceTokenizer(ClipTokenizer):
    """Prompts -> the token ids that T5 or XLM-R reads, by transformers' slow tokenizers, as diffusers' pipelines have
    them; all else as with CLIP.

    T5 has `spiece.model`, ids of sentencepiece and </s> at the end, and reads lower case; XLM-R has
    `sentencepiece.bpe.model`, ids that are one more, and <s> and </s> around a text. ConfigError where the package is
    not installed.
    """

    of = "T5 or XLM-R"

    def _open(self, folder: Path) -> Any:
        if find_spec("sentencepiece") is None:
            raise ConfigError(f"{folder}: its tokenizer needs a package that is not here: pip install sentencepiece")
        from transformers import T5Tokenizer, XLMRobertaTokenizer

        for name, kind in {"spiece.model": T5Tokenizer, "sentencepiece.bpe.model": XLMRobertaTokenizer}.items():
            if (folder / name).exists():
                # False, and no error, where sentencepiece does not know the file.
                if tokenizer := kind.from_pretrained(str(folder)):
                    return tokenizer
                raise WeightError(f"{folder / name}: no model of sentencepiece; download it again")
        raise WeightError(
            f"{folder}: holds no spiece.model (T5) and no sentencepiece.bpe.model (XLM-R), and tokenizer.json does not "
            "do without; take the file from the original model"
        )

    def _encoder(self) -> Callable[[str], list[int]]:
        # As diffusers' pipelines of IF have T5 read a prompt that is not cleaned.
        lowers = "spiece.model" in self._tokenizer.vocab_files_names.values()
        as_read = (lambda text: text.lower().strip()) if lowers else str
        return lambda text: self._tokenizer.encode(as_read(text), add_special_tokens=False)
