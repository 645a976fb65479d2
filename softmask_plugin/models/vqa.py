"""``softmask_vqa``: questions about an image, answered by a decoder that ranks given answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from lavis.models.albef_models.albef_outputs import AlbefOutput
from torch import Tensor

from softmask_plugin.config.options import VqaOptions
from softmask_plugin.errors import UserError, require_finite_scores
from softmask_plugin.losses import distilled_cross_entropy
from softmask_plugin.models.base import shipped_types
from softmask_plugin.models.distillation import DistilledBase
from softmask_plugin.nn.bert import BertForMaskedLM
from softmask_plugin.nn.image_memory import ImageMemory, View
from softmask_plugin.nn.tokens import DecoderText
from softmask_plugin.nn.vision import Visible
from softmask_plugin.registry import register
from softmask_plugin.tokenization import Captions, CaptionTokenizer, as_list

ANSWERS_AT_ONCE = 512  # answers whose distributions over the vocabulary are in memory together


@register("model", "softmask_vqa")
class SoftMaskVqa(DistilledBase):
    """Multi-modal encoder and answer decoder (arXiv 2107.07651, 5), with the state-dict keys and
    losses of LAVIS's ``albef_vqa``.

    LAVIS updates its momentum model during prediction too; this model does so in training only.
    """

    OPTIONS = VqaOptions
    HEADS = ("text_decoder",)
    PRETRAINED_MODEL_CONFIG_DICT = shipped_types("softmask_vqa", "vqav2", "small", "tiny")

    def __init__(self, options: VqaOptions) -> None:
        super().__init__(options)
        shape = self.text_encoder.shape
        shape = replace(
            shape,
            layers=shape.layers - shape.fusion_layer,
            fusion_layer=0,
            image_width=shape.width,  # it attends to the question's states, [CLS] included
            image_cls=True,
            causal=True,
        )
        self.text_decoder = BertForMaskedLM(shape)
        self.answer_tokenizer = CaptionTokenizer(self.tokenizer, options.bert.max_positions)
        # Answers and their tokens, which later calls with the same ones share
        self.known_answers: tuple[list[str], Captions] | None = None
        self.add_momentum("visual_encoder", "text_encoder", "text_decoder")

    def forward(self, samples: dict[str, Any]) -> AlbefOutput:
        """Compute the loss of one step; in training mode, also update the momentum model.

        Args:
            samples: ``image`` (B, 3, H, W), ``text_input`` (list of B questions), ``answer`` (list
                of all their answers), ``n_answers`` (B,) with the number of answers to each
                question, ``weight`` (answers,), and ``epoch``, ``iters``, ``num_iters_per_epoch``
                from LAVIS's tasks.
        """
        draws, alpha = self.progress(samples)
        images = self.visual_encoder.visible(samples["image"], draws)
        captions = self.tokenize(samples["text_input"])
        tokenized, device = self.answer_tokenizer.tokenize(samples["answer"]), self.device
        answers = DecoderText.of(tokenized.ids, tokenized.mask, device)
        counts = torch.as_tensor(samples["n_answers"], device=device)
        question = torch.repeat_interleave(counts, output_size=len(answers.ids))
        view, teacher = View(images=question), None
        logits = self.text_decoder.decode(answers, self.questions(images, captions), view)
        self.update_momentum()
        if self.options.use_distill and alpha > 0:
            with torch.no_grad():
                asked = self.questions(images, captions, "_m")
                teacher = self.text_decoder_m.decode(answers, asked, view)
        losses = distilled_cross_entropy(
            logits, answers.targets, teacher, alpha, self.options.label_smoothing, "none"
        )
        weight = torch.as_tensor(samples["weight"], device=device)[answers.owner]
        return AlbefOutput(loss=(weight * losses).sum() / len(images))

    @torch.no_grad()
    def predict_answers(
        self,
        samples: dict[str, Any],
        answer_list: Sequence[str] | None = None,
        num_ans_candidates: int = 128,
        inference_method: str = "rank",
        **_: Any,
    ) -> list[str]:
        """Choose answers from a list, for LAVIS's task ``vqa``.

        The answers with the likeliest first tokens are candidates, and the likeliest candidate is
        the answer, as in LAVIS. The original ALBEF counts a candidate's first token twice.

        Args:
            samples: ``image`` (B, 3, H, W) and ``text_input``, a question or a list of B.
            answer_list: Answers to choose from.
            num_ans_candidates: How many to compare in full.
            inference_method: "rank"; LAVIS's "generate" is for other models.

        Raises:
            UserError: No list of answers, not one question for each image, a method other than
                ranking, or a NaN or infinite score.
        """
        questions = as_list(samples["text_input"])
        if inference_method != "rank":
            raise UserError(
                f"run.inference_method is '{inference_method}': softmask_vqa ranks given answers, "
                "so set it to rank"
            )
        # A copy, since the caller may change its list
        answers = [] if answer_list is None else list(as_list(answer_list))
        if not answers:
            raise UserError(
                "softmask_vqa ranks answers, but its data set gives no list of them: for "
                "vqa_folder set answers, or questions.train to use its answers; in Python give "
                "answer_list"
            )
        if self.known_answers is None or self.known_answers[0] != answers:
            self.known_answers = answers, self.answer_tokenizer.tokenize(answers)
        known = self.known_answers[1]
        memory = self.questions(samples["image"], self.tokenize(questions))
        likely = self.likely_starts(memory, known.ids[:, 1].to(self.device), len(questions))
        chosen = likely.topk(min(int(num_ans_candidates), len(answers)), dim=1).indices
        losses = self.answer_losses(memory, known, chosen)
        require_finite_scores("an answer's score", likely, losses)
        best = chosen.gather(1, losses.argmin(1, keepdim=True))
        return [answers[i] for i in best.squeeze(1).tolist()]

    def likely_starts(self, memory: ImageMemory, first: Tensor, questions: int) -> Tensor:
        """Probability, (questions, A), that an answer starts with each of these tokens (A,)."""
        start = torch.full((questions, 2), self.tokenizer.cls_token_id)  # the second has no effect
        answers = DecoderText.of(start, torch.ones_like(start, dtype=torch.bool), self.device)
        logits = self.text_decoder.decode(answers, memory)
        return logits.float().softmax(dim=1).index_select(1, first)

    def answer_losses(self, memory: ImageMemory, known: Captions, chosen: Tensor) -> Tensor:
        """Loss of each question's chosen answers, given by their indices (questions, k)."""
        losses, all_rows = [], chosen.flatten().cpu()
        for places in torch.arange(chosen.numel()).split(ANSWERS_AT_ONCE):
            rows = all_rows[places]
            answers = DecoderText.of(known.ids[rows], known.mask[rows], self.device)
            question = places.to(self.device) // chosen.shape[1]
            logits = self.text_decoder.decode(answers, memory, View(images=question))
            words = distilled_cross_entropy(
                logits, answers.targets, None, 0.0, self.options.label_smoothing, "none"
            )
            losses.append(words.new_zeros(len(rows)).index_add_(0, answers.owner, words))
        return torch.cat(losses).view_as(chosen)

    def questions(
        self, images: Tensor | Visible, captions: Captions, suffix: str = ""
    ) -> ImageMemory:
        """Keys and values of the questions' multi-modal states, for each layer of the decoder."""
        fused = self.fuse(images, captions, None, suffix)
        states, mask = fused.packing.pad(fused.states), fused.packing.mask
        return self.part("text_decoder", suffix).bert.remember(states, mask=mask)
