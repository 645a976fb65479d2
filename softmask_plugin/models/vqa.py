"""``softmask_vqa``: questions about an image, answered by a decoder that ranks given answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from softmask_plugin.config.options import VqaOptions
from softmask_plugin.config.paths import shipped
from softmask_plugin.errors import UserError, require_finite_scores
from softmask_plugin.losses import distilled_cross_entropy
from softmask_plugin.models.distillation import DistilledBase
from softmask_plugin.nn.bert import BertForMaskedLM
from softmask_plugin.nn.image_memory import ImageMemory, View
from softmask_plugin.nn.tokens import Packing
from softmask_plugin.registry import register
from softmask_plugin.tokenization import CaptionReader, Captions

ANSWERS_AT_ONCE = 512  # whose words' distributions over the vocabulary are in memory together


@dataclass
class VqaOutput(ModelOutput):
    """Loss of a step (a scalar)."""

    loss: Tensor | None = None


@dataclass(frozen=True)
class Answers:
    """N answers as a decoder scores them: each token predicts the one after it.

    Attributes:
        ids: token ids, (N, T).
        packing: their tokens.
        predicting: all tokens but the last of each answer, M in all.
        targets: the tokens that those predict, (M,).
    """

    ids: Tensor
    packing: Packing
    predicting: Packing
    targets: Tensor

    @classmethod
    def of(cls, ids: Tensor, mask: Tensor, device: torch.device) -> Answers:
        """From ids and mask (N, T) on the CPU, where finding the tokens is free."""
        width = int(mask.any(dim=0).sum())
        ids, mask = ids[:, :width], mask[:, :width]
        predicting = Packing.of(mask[:, 1:])
        targets = ids[:, 1:].flatten()[predicting.index]
        packing = Packing.of(mask).to(device)
        return cls(ids.to(device), packing, predicting.to(device), targets.to(device))

    @property
    def owner(self) -> Tensor:
        """The answer that each predicting token belongs to, (M,)."""
        return self.predicting.index // self.predicting.mask.shape[1]


@register("model", "softmask_vqa")
class SoftMaskVqa(DistilledBase):
    """Multi-modal encoder and answer decoder (arXiv 2107.07651, 5) with the state-dict keys and the
    losses of LAVIS's ``albef_vqa``.

    LAVIS moves its momentum model when it predicts, too; here it moves in training only.
    """

    OPTIONS = VqaOptions
    PRETRAINED_MODEL_CONFIG_DICT = {
        name: shipped(f"models/softmask_vqa_{name}.yaml") for name in ("vqav2", "tiny")
    }

    def __init__(self, options: VqaOptions) -> None:
        super().__init__(options)
        shape = self.text_encoder.shape
        self.text_decoder = BertForMaskedLM(
            replace(
                shape,
                layers=shape.layers - shape.fusion_layer,
                fusion_layer=0,
                image_width=shape.width,  # it looks at the question's states
                causal=True,
            )
        )
        self.answer_reader = CaptionReader(self.tokenizer, options.bert.max_positions)
        self.known_answers: tuple[Sequence[str], Captions] | None = None
        self.add_momentum("visual_encoder", "text_encoder", "text_decoder")

    def forward(self, samples: dict[str, Any]) -> VqaOutput:
        """Loss of one step; in training mode also moves the momentum model.

        Args:
            samples: ``image`` (B, 3, H, W), ``text_input`` list of B questions, ``answer`` list of
                all their answers, ``n_answers`` (B,) how many of them each question has,
                ``weight`` (answers,), and, as LAVIS's tasks give them, ``epoch``, ``iters``,
                ``num_iters_per_epoch``.
        """
        images, text = samples["image"], self.read(samples["text_input"])
        read, device = self.answer_reader.read(samples["answer"]), self.device
        answers = Answers.of(read.ids, read.mask, device)
        question = torch.repeat_interleave(
            torch.as_tensor(samples["n_answers"], device=device), output_size=len(read.ids)
        )
        view, taught, alpha = View(images=question), None, 0.0
        logits = self.decode(self.questions(images, text), answers, view)
        if self.options.use_distill:
            _, alpha = self.progress(samples)
            self.move_momentum()
            with torch.no_grad():
                taught = self.decode(self.questions(images, text, "_m"), answers, view, "_m")
        words = distilled_cross_entropy(
            logits, answers.targets, taught, alpha, self.options.label_smoothing, "none"
        )
        weight = torch.as_tensor(samples["weight"], device=device)[answers.owner]
        return VqaOutput(loss=(weight * words).sum() / len(images))

    @torch.no_grad()
    def predict_answers(
        self,
        samples: dict[str, Any],
        answer_list: Sequence[str],
        num_ans_candidates: int = 128,
        inference_method: str = "rank",
        **_: Any,
    ) -> list[str]:
        """Answer questions from a list, for LAVIS's task ``vqa``.

        The answers whose first token is likeliest are candidates; of these the one whose words are
        likeliest together is the answer, as in ALBEF.

        Args:
            samples: ``image`` (B, 3, H, W) and ``text_input``, a question or a list of B.
            answer_list: answers to choose from.
            num_ans_candidates: how many to compare in full.
            inference_method: "rank"; LAVIS's other one, "generate", is for other models.

        Raises:
            UserError: there is no list of answers, not one question for each image, another
                method than ranking is asked for, or an answer's score is NaN or infinite.
        """
        questions = samples["text_input"]
        questions = [questions] if isinstance(questions, str) else questions
        if inference_method != "rank":
            raise UserError(
                f"run.inference_method is '{inference_method}': softmask_vqa ranks given answers, "
                "set it to rank"
            )
        if not answer_list:
            raise UserError(
                "softmask_vqa ranks answers: its data set gives no list of them; for vqa_folder "
                "set questions.train, whose answers are taken, or answers"
            )
        if len(questions) != len(samples["image"]):
            raise UserError(f"{len(questions)} questions for {len(samples['image'])} images")
        known = self.read_answers(answer_list)
        memory = self.questions(samples["image"], self.read(questions))
        likely = self.likely_starts(memory, known.ids[:, 1].to(self.device), len(questions))
        chosen = likely.topk(min(num_ans_candidates, len(answer_list)), dim=1).indices
        losses = self.answer_losses(memory, known, chosen)
        require_finite_scores("an answer's score", likely, losses)
        best = chosen.gather(1, losses.argmin(1, keepdim=True))
        return [answer_list[i] for i in best.squeeze(1).tolist()]

    def likely_starts(self, memory: ImageMemory, first: Tensor, questions: int) -> Tensor:
        """Probability that an answer to each question starts with each of these tokens (A,):
        (questions, A)."""
        bos = torch.full((questions, 2), self.tokenizer.cls_token_id)  # the second is not read
        start = Answers.of(bos, torch.ones_like(bos, dtype=torch.bool), self.device)
        logits = self.decode(memory, start, View())
        return logits.float().softmax(dim=1).index_select(1, first)

    def answer_losses(self, memory: ImageMemory, known: Captions, chosen: Tensor) -> Tensor:
        """Loss of each chosen answer to each question, (questions, k) like the answers' indices."""
        questions = torch.arange(len(chosen), device=chosen.device)
        questions = questions[:, None].expand_as(chosen).flatten()
        losses = []
        for rows, question in zip(
            chosen.flatten().split(ANSWERS_AT_ONCE), questions.split(ANSWERS_AT_ONCE), strict=True
        ):
            rows = rows.cpu()
            answers = Answers.of(known.ids[rows], known.mask[rows], self.device)
            words = distilled_cross_entropy(
                self.decode(memory, answers, View(images=question)),
                answers.targets,
                None,
                0.0,
                self.options.label_smoothing,
                "none",
            )
            losses.append(words.new_zeros(len(rows)).index_add_(0, answers.owner, words))
        return torch.cat(losses).view_as(chosen)

    def questions(
        self, images: Tensor, text: tuple[Tensor, Packing], suffix: str = ""
    ) -> ImageMemory:
        """Keys and values of the questions' multi-modal states for each layer of the decoder."""
        fused = self.fuse(images, text, None, suffix)
        decoder: Any = self.part("text_decoder", suffix)
        return decoder.bert.remember(fused.packing.pad(fused.states), mask=fused.packing.mask)

    def decode(self, memory: ImageMemory, answers: Answers, view: View, suffix: str = "") -> Tensor:
        """Vocabulary logits (M, vocabulary) of the predicting tokens, each answer looking at the
        question that ``view`` names."""
        decoder: Any = self.part("text_decoder", suffix)
        tokens = decoder.bert.encode(answers.ids, answers.packing)
        return decoder(decoder.bert.fuse(tokens, memory, (view,), answers.predicting).states)

    def read_answers(self, answer_list: Sequence[str]) -> Captions:
        """Tokenize a list of answers, once as long as the same list is asked for."""
        if self.known_answers is None or self.known_answers[0] is not answer_list:
            self.known_answers = answer_list, self.answer_reader.read(list(answer_list))
        return self.known_answers[1]
