"""Schema of a YAML's ``model:`` section: every option of every model, its default and its range."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from math import inf, isfinite
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from softmask_plugin.errors import UserError, require_known, suggest


def ranged(default: float | None, low: float, high: float = inf) -> Any:
    """Declare an option that takes finite numbers from ``low`` to ``high``."""
    return field(default=default, metadata={"range": (low, high)})


def choice(default: str, *others: str) -> Any:
    """Declare an option that takes one of a few words."""
    return field(default=default, metadata={"choices": (default, *others)})


@dataclass
class VitOptions:
    """Image encoder. Defaults: ViT-B/16."""

    patch_size: int = ranged(16, 1)  # side of a patch, pixels; must divide image_size
    width: int = ranged(768, 1)  # channels per token; a multiple of heads
    depth: int = ranged(12, 1)  # number of blocks
    heads: int = 12  # attention heads
    mlp_ratio: float = ranged(4.0, 0)  # hidden width of the MLP, as a multiple of width
    backbone: str | None = None  # a convolutional model of timm whose feature maps, interpolated to
    # the grid of patches, replace their pixels; vit_weights are its weights
    backbone_layers: list[int] = field(default_factory=lambda: [3, 4])  # its feature maps to join;
    # most models have 0 to 4, of strides 2, 4, 8, 16, 32
    backbone_frozen: bool = True  # false: train it too
    patch_dropout: float = ranged(0.0, 0, 0.99)  # share of an image's patches, drawn at random,
    # that a training step leaves out: it costs less, and sees less (FLIP)
    patch_dropout_steps: int | None = ranged(None, 0)  # first steps that leave patches out, so that
    # the others see whole images; null: all


@dataclass
class BertOptions:
    """Text and fusion encoder. Defaults: BERT-base, cut in two as in ALBEF."""

    vocab_size: int | None = ranged(30522, 1)  # number of tokens; null: the tokenizer's
    width: int = ranged(768, 1)  # channels per token; a multiple of heads
    layers: int = 12  # number of layers, text and fusion together
    heads: int = 12  # attention heads
    intermediate: int = ranged(3072, 1)  # hidden width of the feed-forward layers
    fusion_layer: int = 6  # index of the first layer with cross-attention
    max_positions: int = 512  # position embeddings; max_txt_len may not exceed them
    dropout: float = ranged(0.1, 0, 0.99)  # dropout probability
    attention_dropout: float = ranged(0.1, 0, 0.99)  # dropout probability of attention weights
    image_cls: bool = True  # cross-attention also sees the image's [CLS], as in ALBEF; false: only
    # patches, so that words must look at places


@dataclass
class SoftMaskOptions:
    """Innovation 1: the text-driven soft mask for ITM."""

    enabled: bool = True  # whether ITM also sees masked images
    score: str = choice("match", "word", "similarity")  # what the map shows: what the pair's match
    # depends on, as in the paper; or the picked word's own log-probability, where MLM masks it
    # (BLIP: in its captioning); or which patches are like the word
    layer: int | None = None  # BERT layer whose cross-attention gives the map; null: the third
    # with cross-attention (BLIP: 7), at most the last but one. Of the last, ITM uses [CLS] alone,
    # so words have no gradient there.
    words: str = choice("uniform", "content", "energy")  # how the word to mask for is picked
    kind: str = choice("soft", "hard", "random", "uniform")  # all but soft are for ablations
    strength: float = ranged(1.0, 0, 1)  # share of a patch hidden where the map peaks
    start_iter: int = ranged(0, 0)  # first step with a mask; early maps are noise
    in_mlm: bool = False  # predict words from masked images too (the paper advises against it)
    negatives: bool = False  # also pair masked images with wrong captions: a mask is no giveaway
    weight: float = ranged(1.0, 0)  # weight of its losses, on top of itm_weight and mlm_weight


@dataclass
class ItcOptions:
    """Innovation 2: the contrastive loss."""

    loss: str = "focal_itc"  # name of a loss registered with register_loss
    gamma: float = ranged(2.0, 0)  # focusing parameter; 0: ALBEF's ITC
    weight: float = ranged(1.0, 0)  # weight of the loss


@dataclass
class TextOptions:
    """Innovation 3, text side: masked captions."""

    shared: bool = True  # one masked caption for all losses; false: ITC and ITM see the clean one
    mask_prob: float = ranged(0.15, 0, 1)  # probability that a token is masked


@dataclass
class ModelOptions:
    """Options of every model."""

    arch: str = ""  # the model, such as softmask_pretrain
    model_type: str = "base"  # which of its files in lavis_configs/models gives the defaults

    # Initial weights. A checkpoint takes precedence over vit_weights and bert_weights.
    load_pretrained: bool = True  # whether to load `pretrained`, if it is set
    pretrained: str | None = None  # checkpoint of ALBEF or of this plugin: a path, a URL or
    # "shipped:scenes_tiny", the bundled tiny model
    load_finetuned: bool = False  # load `finetuned` instead, as LAVIS does for evaluation
    finetuned: str | None = None  # checkpoint of a fine-tuned model: a path, URL or "shipped:NAME"
    trust_checkpoint: bool = False  # true: unpickle arbitrary objects, which can run any code
    vit_weights: str | None = None  # "deit" (downloaded), "package:NAME" (an installed package), a
    # path or a URL; null: random
    bert_weights: str | None = None  # name of a BERT on the Hub, "package:NAME", or a local folder;
    # null: random

    # Encoders
    image_size: int = ranged(256, 1)  # pixels; must equal the image processors' image_size
    vit: VitOptions = field(default_factory=VitOptions)  # image encoder
    vit_drop_path_rate: float = ranged(0.0, 0, 0.99)  # probability of skipping the last block;
    # falls linearly to 0 at the first
    vit_layer_norm_epsilon: float = ranged(1e-6, 0)  # epsilon of the image encoder's layer norms
    vit_grad_ckpt: bool = False  # recompute image blocks in the backward pass, to save memory
    bert: BertOptions = field(default_factory=BertOptions)  # text and fusion encoder
    tokenizer: str | None = "bert-base-uncased"  # name on the Hub, "scenes", a vocab.txt, that of
    # "package:NAME", a tokenizer's folder, or a file of captions, questions or statements to build
    # a vocabulary from; a checkpoint that has its vocabulary, as this plugin's have, takes
    # precedence
    max_txt_len: int = 30  # tokens, including [CLS] and [SEP]; 3 to bert.max_positions
    sep_token: bool | None = None  # end texts with [SEP]; null: as the checkpoint was trained, so
    # not with ALBEF's own files

    def __post_init__(self) -> None:
        vit, bert = self.vit, self.bert
        _check_values(self, "model")
        if self.load_finetuned and self.finetuned is None:
            raise UserError("model.load_finetuned is true, but model.finetuned names no checkpoint")
        _within("model.max_txt_len", self.max_txt_len, 3, bert.max_positions)
        _within("model.bert.fusion_layer", bert.fusion_layer, 0, bert.layers - 1)
        _multiple("vit.width", vit.width, "vit.heads", vit.heads)
        _multiple("bert.width", bert.width, "bert.heads", bert.heads)
        _multiple("image_size", self.image_size, "vit.patch_size", vit.patch_size)
        layers = vit.backbone_layers
        if not layers or min(layers) < 0 or layers != sorted(set(layers)):
            raise UserError(
                f"model.vit.backbone_layers is {layers}: it must list numbers of feature maps, "
                "from 0 and in ascending order"
            )

    @property
    def checkpoint(self) -> str | None:
        """The checkpoint to load, if any."""
        if self.load_finetuned:
            return self.finetuned
        return self.pretrained if self.load_pretrained else None

    def checked_map_layer(self, key: str, layer: int | None) -> int:
        """The layer whose cross-attention gives the maps; None: the third, as in ALBEF, or the last
        that can give any."""
        first, last = self.bert.fusion_layer, self.bert.layers - 2
        if last < first:
            raise UserError(
                f"model.bert.fusion_layer is {first} of {self.bert.layers} layers: two or more "
                "must have cross-attention, since in the last only [CLS] counts"
            )
        if layer is None:
            layer = min(first + 2, last)
        if not first <= layer <= last:
            raise UserError(
                f"model.{key} is {layer}: choose from {first} to {last}, the layers with "
                "cross-attention before the last, in which only [CLS] counts"
            )
        return layer


@dataclass
class AlignedOptions(ModelOptions):
    """Models that compare images and texts, and all options of ``softmask_nlvr_pretrain``."""

    embed_dim: int = ranged(256, 1)  # size of the features that ITC compares
    temp: float = ranged(0.07, 0.001, 0.5)  # temperature of their similarities, at the start if it
    # is learned; a checkpoint brings its own, but softmask_nlvr_pretrain keeps this, as ALBEF does
    text_pool: str = choice("cls", "mean")  # what ITC compares of a text: its [CLS], as in ALBEF,
    # or the mean of its tokens


@dataclass
class MatchingOptions(AlignedOptions):
    """``softmask_image_text_matching`` and ``softmask_feature_extractor``."""

    map_layer: int | None = None  # BERT layer that gives the word maps; null: as soft_mask.layer
    map_score: str = choice("match", "word", "similarity")  # what they show, as soft_mask.score

    def __post_init__(self) -> None:
        super().__post_init__()
        self.map_layer = self.checked_map_layer("map_layer", self.map_layer)


@dataclass
class MomentumOptions(ModelOptions):
    """Models with a momentum copy, whose predictions are soft targets beside the labels."""

    momentum: float = ranged(0.995, 0, 1)  # share of itself that the copy keeps in each step
    alpha: float = ranged(0.4, 0, 1)  # weight of the soft targets
    alpha_epochs: float = ranged(1.0, 0)  # epochs in which alpha rises from 0


@dataclass
class DistilledOptions(MomentumOptions):
    """Models in which the momentum copy is optional."""

    use_distill: bool = True  # false: no momentum copy, which saves time and memory


@dataclass
class ClassificationOptions(DistilledOptions):
    """``softmask_classification``."""

    max_txt_len: int = 40  # tokens, including [CLS] and [SEP]
    num_classes: int = ranged(3, 2)  # number of labels in the data


@dataclass
class NlvrOptions(ClassificationOptions):
    """``softmask_nlvr``."""

    num_classes: int = ranged(2, 2)  # false and true
    alpha_epochs: float = ranged(2.0, 0)  # epochs in which alpha rises from 0


@dataclass
class VqaOptions(DistilledOptions):
    """``softmask_vqa``."""

    max_txt_len: int = 25  # tokens of a question, including [CLS] and [SEP]
    label_smoothing: float = ranged(0.1, 0, 1)  # over an answer's words; original ALBEF: 0


@dataclass
class ContrastOptions(AlignedOptions, MomentumOptions):
    """Models that learn by contrast and matching, with the soft mask and the focal loss."""

    queue_size: int = ranged(65536, 0)  # earlier images, and as many texts, that ITC contrasts with
    learn_temp: bool = True  # learn temp; learning rates far above 1e-4 drive it to its limit
    alpha_epochs: float = ranged(2.0, 0)  # epochs in which alpha rises from 0; original ALBEF: 1
    itm_weight: float = ranged(1.0, 0)  # weight of the matching loss
    itm_hard_steps: int = ranged(0, 0)  # steps, from the first with ITM, in which its negatives
    # turn from random to hard; 0: hard from the start, as in ALBEF
    itm_words: bool = False  # also match each image with its caption after one word was changed
    local_weight: float = ranged(0.0, 0)  # weight of the contrast of words with patches, which ties
    # words to places
    local_negatives: str = choice("pair", "batch")  # of a word: its caption's other words, as in
    # SPARC, or the other images of the batch
    soft_mask: SoftMaskOptions = field(default_factory=SoftMaskOptions)  # masks images for ITM
    itc: ItcOptions = field(default_factory=ItcOptions)  # contrasts images with texts

    def __post_init__(self) -> None:
        super().__post_init__()
        self.soft_mask.layer = self.checked_map_layer("soft_mask.layer", self.soft_mask.layer)
        if self.soft_mask.in_mlm and not hasattr(self, "mlm_weight"):
            raise UserError("model.soft_mask.in_mlm is true: this model has no MLM")
        if self.soft_mask.score != "match" and self.soft_mask.words == "energy":
            raise UserError(
                "model.soft_mask.words is energy, which goes by the sums of maps, and those of "
                f"soft_mask.score {self.soft_mask.score} do not compare: choose uniform or content"
            )


@dataclass
class PretrainOptions(ContrastOptions):
    """``softmask_pretrain``: all three innovations on."""

    mlm_weight: float = ranged(1.0, 0)  # weight of the masked-word loss
    itc_steps: int = ranged(0, 0)  # first steps, in which only ITC and that contrast are trained
    text: TextOptions = field(default_factory=TextOptions)  # masks captions


@dataclass
class RetrievalOptions(ContrastOptions):
    """``softmask_retrieval``: ALBEF's fine-tuning. The paper does not say whether its own uses the
    soft mask and the focal loss, so both are off."""

    soft_mask: SoftMaskOptions = field(
        default_factory=lambda: SoftMaskOptions(enabled=False)
    )  # masks images for ITM
    itc: ItcOptions = field(default_factory=lambda: ItcOptions(gamma=0.0))  # ALBEF's ITC

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.soft_mask.score == "word":
            raise UserError("model.soft_mask.score is 'word': a retrieval model has no MLM")


@dataclass
class BlipOptions(ContrastOptions):
    """BLIP's models, all of whose text layers have cross-attention."""

    max_txt_len: int = 35  # tokens, including [CLS] and [SEP]; 3 to bert.max_positions
    queue_size: int = ranged(57600, 0)  # earlier images, and as many texts, that ITC contrasts with
    bert: BertOptions = field(default_factory=lambda: BertOptions(fusion_layer=0))  # text and
    # fusion encoder

    def __post_init__(self) -> None:
        if self.bert.fusion_layer != 0:
            raise UserError(
                f"model.bert.fusion_layer is {self.bert.fusion_layer}: all layers of BLIP have "
                "cross-attention, so set it to 0"
            )
        if self.soft_mask.score == "similarity" and not self.local_weight:
            raise UserError(
                "model.soft_mask.score is 'similarity', but nothing makes BLIP's words like "
                "patches: set model.local_weight"
            )
        super().__post_init__()

    def checked_map_layer(self, key: str, layer: int | None) -> int:
        """As in the base class; None: the eighth, as in LAVIS's PNP-VQA, or the last that can
        give any."""
        return super().checked_map_layer(
            key, min(7, self.bert.layers - 2) if layer is None else layer
        )


@dataclass
class BlipRetrievalOptions(BlipOptions, RetrievalOptions):
    """``softmask_blip_retrieval``: BLIP's fine-tuning; soft mask and focal loss are off."""

    # Again, since a data class takes all fields of its first base, inherited ones too
    soft_mask: SoftMaskOptions = field(
        default_factory=lambda: SoftMaskOptions(enabled=False)
    )  # masks images for ITM
    itc: ItcOptions = field(default_factory=lambda: ItcOptions(gamma=0.0))  # BLIP's ITC
    negative_all_rank: bool = False  # draw ITM's negatives from the batches of all processes


@dataclass
class BlipPretrainOptions(BlipOptions):
    """``softmask_blip_pretrain``: BLIP's pre-training with the soft mask and the focal loss."""

    max_txt_len: int = 30  # tokens, including [CLS] and [SEP]; 3 to bert.max_positions
    image_size: int = ranged(224, 1)  # pixels; must equal the image processors' image_size
    lm_weight: float = ranged(1.0, 0)  # weight of the loss of captioning
    label_smoothing: float = ranged(0.1, 0, 1)  # label smoothing over a caption's words


def read_options(schema: type, section: DictConfig | dict[str, Any]) -> Any:
    """Check a ``model:`` section against its schema, and return it as an instance of the schema.

    Raises:
        UserError: An unknown key (the nearest known ones are named), a wrong type or a bad value.
    """
    try:
        if isinstance(section, DictConfig):  # references to other sections need the whole file
            section = OmegaConf.to_container(section, resolve=True)  # type: ignore[assignment]
        section = OmegaConf.create(section)
        _check_keys(_defaults(schema), section, "model")
        return OmegaConf.to_object(OmegaConf.merge(_defaults(schema), section))
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"model.{error.full_key}: {reason}") from error


@cache
def _defaults(schema: type) -> DictConfig:
    """A schema's options with their defaults, made once: it takes longer than all else here."""
    return OmegaConf.structured(schema)


def _check_keys(known: DictConfig, given: DictConfig, place: str) -> None:
    require_known(place, given, known)
    for key in map(str, given):
        if isinstance(known[key], DictConfig):
            if not isinstance(given[key], DictConfig):
                raise UserError(f"{place}.{key} is {given[key]}: it must be a section of keys")
            _check_keys(known[key], given[key], f"{place}.{key}")


def _check_values(section: Any, place: str) -> None:
    for each in fields(section):
        value, key = getattr(section, each.name), f"{place}.{each.name}"
        if is_dataclass(value):
            _check_values(value, key)
        elif "range" in each.metadata and value is not None:
            _within(key, value, *each.metadata["range"])
        elif "choices" in each.metadata and value not in each.metadata["choices"]:
            raise UserError(f"{key} is '{value}': {suggest(value, each.metadata['choices'])}")


def _within(key: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high or not isfinite(value):
        allowed = f"lie in [{low}, {high}]" if isfinite(high) else f"be finite and at least {low}"
        raise UserError(f"{key} is {value}: it must {allowed}")


def _multiple(key: str, value: int, of: str, divisor: int) -> None:
    if divisor < 1 or value % divisor:
        raise UserError(f"model.{key} is {value}, not a multiple of model.{of} {divisor}")
