"""Where a decoder's modules are: in vLLM, in Hugging Face, in a checkpoint, and how ranks split them."""

from dataclasses import dataclass
from enum import Enum


class Split(Enum):
    """How tensor parallelism splits a linear layer's weight (and what feeds it)."""

    QKV = "qkv"  # output rows by head; KV heads replicate when there are fewer than ranks
    QKV_GROUPED = "qkv_grouped"  # as QKV, but stored by KV head as (its q heads, k, v)
    QKV_INTERLEAVED = "qkv_interleaved"  # one part, rows head by head as (q, k, v), and kept so
    COLUMN = "column"  # each part's output rows, evenly
    ROW = "row"  # input columns, evenly; partial products are all-reduced
    NONE = "none"  # replicated


@dataclass(frozen=True)
class Linear:
    """One vLLM linear layer and the Hugging Face modules it fuses.

    Attributes:
        name: vLLM's path inside the layer.
        parts: Hugging Face paths inside the layer, in the order of fusion.
        split: the tensor-parallel rule.
        where: Hugging Face path of a module that layers with it have; None: every layer has it.
        by_head: the input columns of a `ROW` layer belong to attention heads.
        reduces: the partial products of a `ROW` layer are summed over the ranks at once;
            otherwise later, together with others'.
    """

    name: str
    parts: tuple[str, ...]
    split: Split
    where: str | None = None
    by_head: bool = False
    reduces: bool = True


@dataclass(frozen=True)
class Attention:
    """The attention of a decoder layer; layers without its Hugging Face module have none.

    Attributes:
        name: vLLM's path of the attention module inside the layer.
        module: Hugging Face's path of it inside the layer.
        latent: one latent vector per token is cached for all heads (multi-head latent
            attention); decode runs on it with absorbed queries.
    """

    name: str
    module: str
    latent: bool = False


@dataclass(frozen=True)
class Experts:
    """The routed experts of a layer, one fused op in vLLM; layers without them have none.

    Attributes:
        name: vLLM's path of the fused op inside the layer.
        module: Hugging Face's path of the experts module inside the layer.
        router: Hugging Face's path of the router inside the layer.
        each: checkpoint paths of one expert's gate, up and down weights, `{}` its
            number; empty where checkpoints hold stacked tensors only.
        stacked: checkpoint paths of the stacked gate-and-up and down tensors, each
            (experts, out, in).
        biased: experts have biases, stacked, called as their weights with `_bias`.
        transposed: stacked tensors are (experts, in, out).
        interleaved: rows of gate and up alternate; otherwise gate comes first.
        scales_input: the router's weight multiplies an expert's input in Hugging Face; in
            vllm-gaudi the output, as in other families.
        late_factor: key of config.json of a factor that Hugging Face's routing weights
            contain and vLLM applies behind the fused op.
    """

    name: str
    module: str
    router: str
    each: tuple[str, ...] = ()
    stacked: tuple[str, ...] = ()
    biased: bool = False
    transposed: bool = False
    interleaved: bool = False
    scales_input: bool = False
    late_factor: str | None = None


@dataclass(frozen=True)
class Unmeasured:
    """A linear layer that INC patches and no engine here measures, so that it must stay blocked.

    Attributes:
        name: vLLM's path inside the layer.
        module: Hugging Face's path of the module it is or belongs to.
    """

    name: str
    module: str


@dataclass(frozen=True)
class Layout:
    """Where vLLM and Hugging Face keep the modules of a decoder.

    Attributes:
        layers: Hugging Face's path of the layer list.
        modules: what a decoder layer has, in vLLM's module order.
        embedding: path of the token embedding, the same in both.
        renames: (part of Hugging Face's name, the same in checkpoints) where they differ.
        lm_head: names the output projection has in checkpoints.
        ties_head: it is the embedding where config.json has no `tie_word_embeddings`.
        vllm_layers: vLLM's path of the layer list, where it differs.
        vllm_lm_head: vLLM's name of it, or None where vLLM projects with the
            embedding module, which INC does not measure.
        outer: linear layers outside the decoder layers (absolute paths), if present.
        uses_attention_interface: False where the attention calls
            `scaled_dot_product_attention` itself.
        text_prefix: of the language model's tensors in checkpoints of a larger model, whose
            config.json describes it under `text_config`.
        others: vLLM's names of the larger model's other parts, which no engine here measures.
        packs: False where positions cannot be given, so that one sequence runs at a time.
    """

    layers: str
    modules: tuple[Linear | Attention | Experts | Unmeasured, ...]
    embedding: str
    renames: tuple[tuple[str, str], ...] = ()
    lm_head: tuple[str, ...] = ("lm_head",)
    ties_head: bool = False
    vllm_lm_head: str | None = "lm_head"
    vllm_layers: str | None = None
    outer: tuple[Linear, ...] = ()
    uses_attention_interface: bool = True
    text_prefix: str = ""
    others: tuple[str, ...] = ()
    packs: bool = True

    @property
    def linears(self) -> tuple[Linear, ...]:
        """The linear layers among `modules`."""
        return tuple(module for module in self.modules if isinstance(module, Linear))

    @property
    def attention(self) -> Attention:
        """The attention among `modules`."""
        return next(module for module in self.modules if isinstance(module, Attention))

    @property
    def experts(self) -> Experts | None:
        """The experts among `modules`, or None."""
        return next((module for module in self.modules if isinstance(module, Experts)), None)
