"""Every option of the models with its default: the schema that YAML files are checked against."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf, isfinite
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from softmask_plugin.errors import UserError, suggest


@dataclass
class VitOptions:
    """Image encoder; the defaults are ViT-B/16's."""

    patch_size: int = 16  # pixels
    width: int = 768  # channels of a token
    depth: int = 12  # blocks
    heads: int = 12  # of its attention; width must be a multiple
    mlp_ratio: float = 4.0  # width of the MLP's hidden layer over `width`


@dataclass
class BertOptions:
    """Text and multi-modal encoder; the defaults are BERT-base's."""

    vocab_size: int | None = 30522  # null: as many as the tokenizer has
    width: int = 768  # channels of a token
    layers: int = 12  # of both encoders together
    heads: int = 12  # of its attention; width must be a multiple
    intermediate: int = 3072  # width of the feed-forward layer
    fusion_layer: int = 6  # the first layer with cross-attention
    max_positions: int = 512  # tokens that there are positions for; max_txt_len is at most this
    dropout: float = 0.1  # chance of an activation to be dropped, 0 to 0.99
    attention_dropout: float = 0.1  # chance of an attention weight to be dropped, 0 to 0.99


@dataclass
class SoftMaskOptions:
    """Innovation 1: text-driven soft mask for ITM."""

    enabled: bool = True  # whether ITM sees masked images too
    layer: int | None = None  # BERT layer that gives the map; null: the 3rd with cross-attention,
    # or the last but one. Not the last: ITM reads its [CLS] alone, so words have no gradient there.
    words: str = "uniform"  # which word is picked: uniform | content | energy
    kind: str = "soft"  # soft, or for ablations hard | random | uniform
    strength: float = 1.0  # share of a patch that the map's maximum hides, 0 to 1
    start_iter: int = 0  # no mask before this iteration: early maps are noise
    in_mlm: bool = False  # predict words from the masked features too (the paper advises against)
    negatives: bool = False  # masked images with wrong captions too, so that a mask is no giveaway
    weight: float = 1.0  # of its terms, on top of itm_weight and mlm_weight


@dataclass
class ItcOptions:
    """Innovation 2: the contrastive loss."""

    loss: str = "focal_itc"  # a name given to register_loss
    gamma: float = 2.0  # 0 is ALBEF's ITC
    weight: float = 1.0  # of its term in the loss, 0 or more


@dataclass
class TextOptions:
    """Innovation 3, text side: masked captions."""

    shared: bool = True  # one masked caption for all losses; false: ITC and ITM read clean text
    mask_prob: float = 0.15  # chance of a token to be masked, 0 to 1


@dataclass
class ModelOptions:
    """What every model has (the ``model:`` section of a YAML)."""

    arch: str = ""  # the model's name, such as softmask_pretrain
    model_type: str = "base"  # which of its files in lavis_configs/models has the defaults

    # Weights to start from. A checkpoint makes vit_weights and bert_weights moot.
    load_pretrained: bool = True  # whether to load `pretrained`, where it is given
    pretrained: str | None = None  # checkpoint of ALBEF or of this plugin: path, URL or
    # "shipped:scenes_tiny", the tiny model that comes with the package
    load_finetuned: bool = False  # whether to load `finetuned` instead, LAVIS's key for evaluation
    finetuned: str | None = None  # checkpoint of a fine-tuned model: path, URL or "shipped:NAME"
    trust_checkpoint: bool = False  # true: read pickled objects too, which can run any code
    vit_weights: str | None = None  # "deit" (downloaded), a path or URL; null: random
    bert_weights: str | None = None  # a BERT of the hub or a local folder; null: random

    # Encoders
    image_size: int = 256  # pixels; the processors' image_size must be the same
    vit: VitOptions = field(default_factory=VitOptions)  # shape of the image encoder
    vit_drop_path_rate: float = 0.0  # chance to skip the last block, 0 to 0.99; earlier: less
    vit_layer_norm_epsilon: float = 1e-6  # added to variances, so that none is divided by zero
    vit_grad_ckpt: bool = False  # recompute image blocks in the backward pass: less memory
    bert: BertOptions = field(default_factory=BertOptions)  # shape of the text and fusion encoder
    tokenizer: str | None = "bert-base-uncased"  # or "scenes", a vocab.txt, a file of captions,
    # questions or statements to make one from, a folder
    max_txt_len: int = 30  # tokens, [CLS] and [SEP] included

    def __post_init__(self) -> None:
        vit, bert = self.vit, self.bert
        _within("image_size", self.image_size, 1, inf)
        _within("vit.patch_size", vit.patch_size, 1, self.image_size)
        for key, value, least in (
            ("vit.width", vit.width, 1),
            ("vit.depth", vit.depth, 1),
            ("vit.mlp_ratio", vit.mlp_ratio, 0),
            ("vit_layer_norm_epsilon", self.vit_layer_norm_epsilon, 0),
            ("bert.width", bert.width, 1),
            ("bert.intermediate", bert.intermediate, 1),
            ("bert.vocab_size", 1 if bert.vocab_size is None else bert.vocab_size, 1),
        ):
            _within(key, value, least, inf)
        for key, chance in (
            ("vit_drop_path_rate", self.vit_drop_path_rate),
            ("bert.dropout", bert.dropout),
            ("bert.attention_dropout", bert.attention_dropout),
        ):
            _within(key, chance, 0, 0.99)
        _within("max_txt_len", self.max_txt_len, 3, self.bert.max_positions)
        _within("bert.fusion_layer", self.bert.fusion_layer, 0, self.bert.layers - 1)
        _multiple("vit.width", self.vit.width, "vit.heads", self.vit.heads)
        _multiple("bert.width", self.bert.width, "bert.heads", self.bert.heads)
        _multiple("image_size", self.image_size, "vit.patch_size", self.vit.patch_size)

    @property
    def default_map_layer(self) -> int:
        """The third fusion layer, as in ALBEF, or the last but one: of the last only [CLS] counts,
        in which words have no gradient."""
        return min(self.bert.fusion_layer + 2, self.bert.layers - 2)

    def check_map_layer(self, key: str, layer: int) -> None:
        """Raise UserError where a layer's cross-attention gives no map of a word."""
        first, last = self.bert.fusion_layer, self.bert.layers - 2
        if not first <= layer <= last:
            raise UserError(
                f"model.{key} is {layer}: choose from {first} to {last}, the layers with "
                "cross-attention before the last, in which only [CLS] counts"
            )


@dataclass
class AlignedOptions(ModelOptions):
    """Models that compare images and texts: ``softmask_image_text_matching`` and
    ``softmask_feature_extractor``."""

    embed_dim: int = 256  # of the features that ITC compares
    temp: float = 0.07  # temperature of their similarities
    map_layer: int | None = None  # BERT layer that gives word maps; null: as soft_mask.layer

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.map_layer is None:
            self.map_layer = self.default_map_layer
        self.check_map_layer("map_layer", self.map_layer)
        _within("embed_dim", self.embed_dim, 1, inf)
        _within("temp", self.temp, 0.001, 0.5)


@dataclass
class DistilledOptions(ModelOptions):
    """Models with a momentum copy that teaches them: soft targets beside the labels."""

    use_distill: bool = True  # false: no momentum copy at all, less time and memory
    momentum: float = 0.995  # share of itself that the momentum copy keeps in a step, 0 to 1
    alpha: float = 0.4  # weight of the momentum model's soft targets, 0 to 1
    alpha_epochs: float = 1.0  # epochs over which alpha rises from 0

    def __post_init__(self) -> None:
        super().__post_init__()
        _within("momentum", self.momentum, 0, 1)
        _within("alpha", self.alpha, 0, 1)
        _within("alpha_epochs", self.alpha_epochs, 0, inf)


@dataclass
class ClassificationOptions(DistilledOptions):
    """``softmask_classification``."""

    max_txt_len: int = 40  # tokens, [CLS] and [SEP] included
    num_classes: int = 3  # that pairs are sorted into: as many as the data has labels

    def __post_init__(self) -> None:
        super().__post_init__()
        _within("num_classes", self.num_classes, 2, inf)


@dataclass
class NlvrOptions(ClassificationOptions):
    """``softmask_nlvr`` and its pretraining step ``softmask_nlvr_pretrain``."""

    num_classes: int = 2  # false and true
    alpha_epochs: float = 2.0  # epochs over which alpha rises from 0


@dataclass
class VqaOptions(DistilledOptions):
    """``softmask_vqa``."""

    max_txt_len: int = 25  # tokens of a question, [CLS] and [SEP] included
    label_smoothing: float = 0.1  # 0 to 1, of an answer's words; LAVIS: 0.1, original ALBEF: 0

    def __post_init__(self) -> None:
        super().__post_init__()
        _within("label_smoothing", self.label_smoothing, 0, 1)


@dataclass
class ContrastOptions(ModelOptions):
    """Models that learn by contrast and matching, with the soft mask and the focal loss."""

    # Contrast and momentum distillation
    embed_dim: int = 256  # of the features that ITC compares
    queue_size: int = 65536  # earlier images, and as many texts, in ITC; 0: the batch alone
    momentum: float = 0.995  # share of itself that the momentum copy keeps in a step, 0 to 1
    temp: float = 0.07  # temperature of ITC's similarities, at first if it is learnt; 0.001 to 0.5
    learn_temp: bool = True  # false at learning rates far above 1e-4, which drive it to its clamp
    alpha: float = 0.4  # weight of the momentum model's soft targets, 0 to 1
    alpha_epochs: float = 2.0  # epochs over which alpha rises from 0; LAVIS: 2, original ALBEF: 1

    itm_weight: float = 1.0  # of matching's term in the loss, 0 or more

    soft_mask: SoftMaskOptions = field(default_factory=SoftMaskOptions)  # of the images in ITM
    itc: ItcOptions = field(default_factory=ItcOptions)  # the loss that contrasts images and texts

    def __post_init__(self) -> None:
        super().__post_init__()
        mask = self.soft_mask
        _one_of("soft_mask.words", mask.words, ("uniform", "content", "energy"))
        _one_of("soft_mask.kind", mask.kind, ("soft", "hard", "random", "uniform"))
        _within("soft_mask.strength", mask.strength, 0, 1)
        _within("momentum", self.momentum, 0, 1)
        _within("alpha", self.alpha, 0, 1)
        _within("alpha_epochs", self.alpha_epochs, 0, inf)
        _within("embed_dim", self.embed_dim, 1, inf)
        _within("itc.gamma", self.itc.gamma, 0, inf)
        _within("itc.weight", self.itc.weight, 0, inf)
        _within("itm_weight", self.itm_weight, 0, inf)
        _within("soft_mask.start_iter", mask.start_iter, 0, inf)
        _within("soft_mask.weight", mask.weight, 0, inf)
        _within("temp", self.temp, 0.001, 0.5)
        _within("queue_size", self.queue_size, 0, inf)
        if mask.layer is None:
            mask.layer = self.default_map_layer
        self.check_map_layer("soft_mask.layer", mask.layer)


@dataclass
class PretrainOptions(ContrastOptions):
    """``softmask_pretrain``: all three innovations on."""

    mlm_weight: float = 1.0  # of the term of predicted words in the loss, 0 or more
    text: TextOptions = field(default_factory=TextOptions)  # how captions are masked

    def __post_init__(self) -> None:
        super().__post_init__()
        _within("mlm_weight", self.mlm_weight, 0, inf)
        _within("text.mask_prob", self.text.mask_prob, 0, 1)


@dataclass
class RetrievalOptions(ContrastOptions):
    """``softmask_retrieval``: ALBEF's fine-tuning; the paper does not say whether its own has the
    soft mask and the focal loss, so both are off."""

    soft_mask: SoftMaskOptions = field(
        default_factory=lambda: SoftMaskOptions(enabled=False)
    )  # of the images in ITM
    itc: ItcOptions = field(default_factory=lambda: ItcOptions(gamma=0.0))  # ALBEF's ITC

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.soft_mask.in_mlm:
            raise UserError("model.soft_mask.in_mlm is true: softmask_retrieval has no MLM")


def read_options(schema: type, section: DictConfig | dict[str, Any]) -> Any:
    """Check a ``model:`` section against its schema and return it as an instance of the schema.

    Raises:
        UserError: an unknown key (with the nearest known ones), a wrong type or a bad value.
    """
    try:
        if isinstance(section, DictConfig):  # references to other sections need the whole file
            section = OmegaConf.to_container(section, resolve=True)  # type: ignore[assignment]
        section = OmegaConf.create(section)
        _check_keys(OmegaConf.structured(schema), section, "model")
        merged = OmegaConf.merge(OmegaConf.structured(schema), section)
        return OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"model.{error.full_key}: {reason}") from error


def _check_keys(known: DictConfig, given: DictConfig, place: str) -> None:
    for key in map(str, given):
        if key not in known:
            raise UserError(f"unknown key {place}.{key}: {suggest(key, map(str, known))}")
        if isinstance(known[key], DictConfig):
            if not isinstance(given[key], DictConfig):
                raise UserError(f"{place}.{key} is {given[key]}: it must be a section of keys")
            _check_keys(known[key], given[key], f"{place}.{key}")


def _one_of(key: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"model.{key} is '{value}': {suggest(value, choices)}")


def _multiple(key: str, value: int, of: str, divisor: int) -> None:
    if divisor < 1 or value % divisor:
        raise UserError(f"model.{key} is {value}, not a multiple of model.{of} {divisor}")


def _within(key: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high or not isfinite(value):
        allowed = f"lie in [{low}, {high}]" if isfinite(high) else f"be finite and at least {low}"
        raise UserError(f"model.{key} is {value}: it must {allowed}")
