"""The text encoders of a model as one network.

Shapes: B prompts, T encoders, S tokens, D width of an encoder's states, E all of them side by side, P of pooled text.
"""

from collections.abc import Mapping, Sequence

import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops

from dreambooth_ms.errors import ConfigError
from dreambooth_ms.models.words import ExtendedEmbedding
from dreambooth_ms.ops import equal_parts
from dreambooth_ms.runtime.compiled_cell import CompiledCell


class TextEncoders(CompiledCell):
    """Token ids (B, T S), those of T encoders side by side -> what the denoiser reads, in float32.

    That is (states (B, S, E),), or with an encoder that pools (states, pooled text (B, P)): then the ends of the texts
    (B, S) come after the ids, 1 at the token where one ends and 0 elsewhere. An encoder is a cell with

        read(ids (B, S), ends, skip) -> (states (B, S, D),) or (states, pooled (B, P)), `skip` layers early
        most_skipped                 how many layers it can leave out
        is_read(parameter, skip)     whether what it then yields depends on a parameter
        words                        its table of tokens, which `add_words(rows (W, D))` extends

    Args:
        networks: the encoders, by the names of their folders.
        clip_skip: layers whose work the denoiser does not see, more than the model itself leaves out; pooled text sees
            all.
    """

    title = "the text encoders"

    def __init__(self, networks: Mapping[str, nn.Cell], clip_skip: int = 0) -> None:
        super().__init__(auto_prefix=False)
        self.names = tuple(networks)
        self.encoders = nn.CellList(list(networks.values()), auto_prefix=False)
        self.clip_skip = clip_skip

    def construct(self, ids: Tensor, *end_BS: Tensor) -> tuple[Tensor, ...]:
        count = len(self.encoders)
        ids_of_each = equal_parts(ids, count, 1) if count > 1 else (ids,)
        states, pooled = (), ()
        for number, encoder in enumerate(self.encoders):
            results = encoder.read(ids_of_each[number], end_BS, self.clip_skip)
            states += results[:1]
            if len(results) > 1:
                pooled += (results[1].astype(ms.float32),)
        text_BSE = ops.concat(states, 2) if count > 1 else states[0]
        return (text_BSE.astype(ms.float32), *pooled)

    def with_clip_skip(self, clip_skip: int) -> "TextEncoders":
        """The same encoders with another `clip_skip`, to be compiled anew; ConfigError if one has too few layers."""
        check_clip_skip(clip_skip, [encoder.most_skipped for encoder in self.encoders])
        return TextEncoders(self.networks(), clip_skip)

    def new_rows(self) -> dict[str, Parameter]:
        """The vectors (W, D) of new words, by the names of the encoders' folders."""
        tables = {name: network.words for name, network in self.networks().items()}
        return {name: table.new_rows for name, table in tables.items() if isinstance(table, ExtendedEmbedding)}

    def networks(self) -> dict[str, nn.Cell]:
        """The encoders by the names of their folders."""
        return dict(zip(self.names, self.encoders, strict=True))

    def is_read(self, network: str, parameter: str) -> bool:
        """Whether the prediction depends on a parameter: of an encoder, not all may be; of other networks, all are."""
        return network not in self.names or bool(self.networks()[network].is_read(parameter, self.clip_skip))


def check_clip_skip(clip_skip: int, most_skipped: Sequence[int]) -> None:
    """Raise ConfigError if an encoder cannot leave out so many layers, by how many each can."""
    most = min(most_skipped, default=0)
    if clip_skip > most:
        raise ConfigError(f"--clip_skip: expected 0 to {most}, as its text encoders have layers, got {clip_skip}")
