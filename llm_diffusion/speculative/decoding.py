"""Lossless decoding: the adapter drafts a block by diffusion, the base with the adapter off accepts what it would have predicted itself.

The key-value cache holds clean text as the base wrote it. One forward pass of a cycle has rows of two kinds:

    cache        | t  d1 d2 d3       | M  M  M  M   M  M  M  M   …        t: the base's own next token; d: the draft
    clean text   | verified, causal, | next drafts, one for every place    M: mask tokens
                 | adapter off       | where the draft may end, adapter on

The verified rows tell how far the draft is right and what comes next; the drafts of that outcome are the next cycle's, and everything
behind the accepted rows is cropped off the cache. So a pass yields up to a block. Without drafts in advance (`draft_outcomes=0`), or
after an outcome that was not drafted for, a pass of its own drafts [t M M M], which knows t.

A row whose draft was worse than its neighbours' keeps dead columns in the cache, which nothing attends to: the cache is cropped to the
best row and never copied. Greedy output is the base's own, up to ties of its rounding; sampled output is distributed as the base's.

How many outcomes are drafted for, and whether drafts pay at all, follows from what passes cost on this machine, see `schedule`. A draft
that has a pass of its own is a tree, see `trees`: the rows `d` are then several ways to go on, each of which sees its own. Where the last
tokens stood in the text before, what followed them there is a draft that costs no pass.

References: speculative decoding (arXiv 2211.17192), drafts in advance as in Medusa (arXiv 2401.10774), prompt lookup (Saxena, 2023).
"""

from __future__ import annotations

import torch
from transformers import DynamicCache, GenerationConfig

from .. import UserError
from ..models.packing import packed
from ..models.patching import base_of, in_eval_mode
from ..models.record import record_of
from ..models.sampling import DiffusionOutput, OnStep, Recorder, ban, behind, check_decodable, eos_ids, sample, warped
from ..objective.attention_masks import additive, block_causal
from ..objective.noise import MASK_STREAM, ORDER_STREAM, TOKEN_STREAM, row_keys, uniform
from .acceptance import accept_greedy, accept_sampled
from .adapters import AdapterSwitch
from .schedule import DraftSchedule, Yield, schedule_of
from .trees import DraftTree, accept_tree, likeliest_tree, reorder_columns

# Rows of a pass that cost little more than one row does, by arithmetic against bandwidth: for sampling, whose tokens depend on when was
# drafted, which must depend neither on a clock nor on the other rows of a batch.
FREE_ROWS = {"cpu": 32, "cuda": 512}


def decode_lossless(
    model: torch.nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    settings: GenerationConfig,
    on_step: OnStep | None = None,
) -> DiffusionOutput:
    """Answers left-padded prompts (B, P) as the base would; sequences (B, P + max_new_tokens), `accepted` (B, cycles)."""
    # Walking a small model to set its mode costs as much as running it.
    with in_eval_mode(model) if model.training else torch.no_grad(), packed(model):
        return LosslessDecoder(model, input_ids, attention_mask, settings).run(on_step)


class LosslessDecoder:
    """One batch under lossless decoding.

    Args:
        model: with its adapters, any wrapper.
        input_ids, attention_mask: (B, P) prompts of at least one token, padded on the left.
        settings: `block_length` is the draft's, the token before it included; `temperature`, `top_p`, `top_k` are the base's.
    """

    def __init__(
        self, model: torch.nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor, settings: GenerationConfig
    ) -> None:
        if not bool(attention_mask.any(-1).all()):
            raise UserError("`input_ids`: the autoregressive base needs a prompt of at least one token.")
        self.model, self.settings = base_of(model), settings
        self.block_length = record_of(model).block_length
        self.eos = eos_ids(settings, input_ids.device)
        self.prompt_length = input_ids.shape[1]
        masks = torch.full((len(input_ids), settings.max_new_tokens), settings.mask_token_id, device=input_ids.device)
        self.canvas = torch.cat([input_ids, masks], -1)
        self.keys = row_keys(self.canvas, torch.cat([attention_mask, torch.ones_like(masks)], -1))
        self.valid = attention_mask.bool()  # (B, C) columns of the cache that hold text
        self.length = attention_mask.sum(-1)  # position of the next token
        self.done = torch.zeros_like(self.length)  # tokens answered
        self.gone: torch.Tensor | None = None  # (B,) bool, rows that nobody waits for
        self.rows = torch.arange(len(input_ids), device=input_ids.device)
        self.nfe = torch.zeros_like(self.length)
        self.accepted: list[torch.Tensor] = []
        self.counts = torch.zeros(self.block_length, device=input_ids.device)  # how often a draft ended where
        self.schedule: DraftSchedule | None = None
        self.is_copy, self.copies = False, Yield(self.block_length)  # what copies yield is a matter of the text
        # (B,) bool, whether the draft was made in advance; None: there is no draft
        self.ahead: torch.Tensor | None = None
        self.nodes = 0  # tokens of the next draft, if that is to be a tree; 0: a block
        self.tree: DraftTree | None = None  # that `draft` stands for
        self.cache = DynamicCache()
        # Drafts may reach further than the model can count; what is there is never accepted.
        self.last_place = (getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30) - 1

    def run(self, on_step: OnStep | None = None) -> DiffusionOutput:
        """Decodes all rows to their end."""
        recorder = Recorder(self.settings, on_step)
        with AdapterSwitch(self.model, in_int8=not self.settings.temperature) as self.switch:
            if self.settings.draft_outcomes is None and not self.settings.temperature:
                self.schedule = schedule_of(self.model, self.block_length, self.switch)
            self._prefill()
            while self.rows.numel():
                self._cycle()
                self.gone = recorder.step(self.canvas)
        output = recorder.output(self.canvas, behind(self.canvas, self.prompt_length), self.nfe, self.eos)
        output.accepted = torch.stack(self.accepted, -1)
        return output

    def _outcomes(self) -> list[int] | None:
        """Numbers of drafted tokens accepted, 0 to b - 1, that the next drafts are made for, the longest (sampling) or most frequent first;
        None: decode without a draft."""
        if self.schedule is not None:
            return self.schedule.choose(len(self.rows))
        wanted = self.settings.draft_outcomes
        if wanted is None:
            free = FREE_ROWS.get(self.canvas.device.type, FREE_ROWS["cpu"])
            wanted = self.block_length if self.block_length * (self.block_length + 1) <= free else 0
        if wanted >= self.block_length:
            return list(range(self.block_length))
        if wanted <= 0:
            return []
        # Until something is known, drafts are taken to be right.
        prior = torch.linspace(0, 0.5, self.block_length, device=self.counts.device)
        seen = 0 if self.settings.temperature else self.counts
        return (seen + prior).topk(wanted).indices.tolist()

    def _plan_tree(self, outcomes: list[int] | None) -> None:
        """The size of the next tree; a block that is drafted ahead, or while others are, is none."""
        self.nodes = 0
        if self.schedule is not None and outcomes == []:
            # Some models cannot have more columns than places; this cycle adds up to a block.
            room = self.last_place - self.valid.shape[1] - self.block_length
            self.nodes = max(1, min(self.schedule.best_tree(len(self.rows))[1], room))

    def _prefill(self) -> None:
        """The prompt, and the first drafts behind it."""
        ids, place = self.canvas[:, : self.prompt_length], (self.valid.cumsum(-1) - 1).clamp(min=0)
        outcomes = self._outcomes()
        self._plan_tree(outcomes)
        ends = [self.prompt_length] if outcomes else []
        logits = self._forward(ids, place, block_causal(self.valid.long(), 1), 1, ends)
        if ends:
            self.cache.crop(-self.block_length)
        token, probs = self._pick(logits[:, :1], ORDER_STREAM, 0)
        self.token = token[:, 0]
        check_decodable(bool(_is_finite((logits if probs is None else probs)[:, 0], self.token)))
        self.accepted.append(torch.full_like(self.done, -1))
        stay = self._leave(torch.ones_like(self.rows, dtype=torch.bool))
        if self.rows.numel() and outcomes is not None:
            self._draft(logits[stay][:, None, 1:], torch.full_like(self.rows, 0 if ends else -1))

    def _forward(
        self, ids: torch.Tensor, place: torch.Tensor, allowed: torch.Tensor, n_logits: int, ends: list[int]
    ) -> torch.Tensor:
        """One pass over clean rows (B, R), adapter off, and blocks of masks behind them, adapter on.

        Args:
            place: (B, R) positions of the clean rows.
            allowed: (B, R, C + R) bool, what they see, cached columns first.
            n_logits: of how many of them, the last ones, logits are wanted.
            ends: how many clean rows each block sees, and stands behind.

        Returns:
            (B, n_logits + len(ends) * (b - 1), V) fp32, banned tokens out of reach.
        """
        b, batch, n_clean, width = self.block_length, len(ids), ids.shape[1], allowed.shape[2]
        n_masks, index = b * len(ends), torch.arange(width, device=ids.device)
        mask = torch.zeros((batch, n_clean + n_masks, width + n_masks), dtype=torch.bool, device=ids.device)
        mask[:, :n_clean, :width] = allowed
        keep, places = [index[n_clean - n_logits : n_clean]], [place]
        for start, end in zip(range(0, n_masks, b), ends, strict=True):
            rows, columns = slice(n_clean + start, n_clean + start + b), slice(width + start, width + start + b)
            mask[:, rows, :width] = allowed[:, -1:] & (index < width - n_clean + end)
            mask[:, rows, columns] = True
            places.append(place[:, -1:] + 1 - n_clean + end + torch.arange(b, device=ids.device))
            keep.append(torch.arange(rows.start, rows.stop - 1, device=ids.device))
        masks = torch.full((batch, n_masks), self.settings.mask_token_id, device=ids.device)
        self.switch.first = n_clean if n_masks else None
        return self._call(torch.cat([ids, masks], -1), torch.cat(places, -1), mask, torch.cat(keep))

    def _call(self, ids: torch.Tensor, place: torch.Tensor, mask: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        self.nfe[self.rows] += 1
        logits = self.model(
            input_ids=ids,
            attention_mask=additive(mask, self.model.dtype),
            position_ids=place.clamp(max=self.last_place),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=keep,
        ).logits
        return ban(logits.float(), self.settings)

    def _draft(self, drafts: torch.Tensor, chosen: torch.Tensor) -> None:
        """Takes the drafts (B, n, b - 1, V) of the outcome (B,) that came true, -1 = none; or makes them, knowing the token."""
        missing = chosen < 0
        self.ahead, any_missing, all_missing = ~missing, bool(missing.any()), bool(missing.all())
        copy = self._copy() if all_missing else None
        self.is_copy, self.tree = copy is not None, None
        if copy is not None:
            self.draft = copy
            return
        if not all_missing:
            logits = drafts[torch.arange(len(chosen), device=chosen.device), chosen.clamp(min=0)]
        if any_missing:
            b, block = self.block_length, torch.arange(self.block_length, device=self.token.device)
            ids = torch.where(block > 0, self.settings.mask_token_id, self.token[:, None])
            mask = torch.nn.functional.pad(self.valid, (0, b), value=True)[:, None].expand(-1, b, -1)
            self.switch.first = 0
            made = self._call(ids, self.length[:, None] + block, mask, block[:-1])
            self.cache.crop(-b)
            logits = made if all_missing else torch.where(missing[:, None, None], made, logits)
        if self.nodes:
            self.tree = likeliest_tree(logits, self.nodes)
            self.draft = self.tree.tokens
            return
        self.draft, self.draft_probs = self._pick(logits, TOKEN_STREAM, 1)

    def _copy(self) -> torch.Tensor | None:
        """(B, b - 1) what `copied` finds, where all rows have it and it pays."""
        if self.schedule is None or not self.schedule.copies_pay(self.copies, len(self.rows)):
            return None
        end = self.prompt_length + self.done[self.rows]
        text = self.canvas[self.rows].scatter(-1, end[:, None], self.token[:, None])
        found, has = copied(text, end, self.block_length - 1)
        return found if bool(has.all()) else None

    def _noise(self, stream: int, n: int, first: int) -> torch.Tensor:
        """(B, n) uniform numbers for the tokens `first` places behind the next one and on."""
        place = self.length[:, None] + first + torch.arange(n, device=self.length.device)
        return uniform(self.settings.seed, self.keys[self.rows][:, None], place, stream)

    def _pick(self, logits: torch.Tensor, stream: int, first: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, n, V) -> (B, n) the best tokens; or samples, and the distributions that they are drawn from."""
        if not self.settings.temperature:
            return logits.argmax(-1), None
        probs = warped(logits, self.settings).softmax(-1)
        return sample(probs, self._noise(stream, logits.shape[1], first)), probs

    def _cycle(self) -> None:
        """Verifies the draft, and drafts on from wherever it may end; or adds the base's next token alone."""
        outcomes, rows = self._outcomes(), len(self.rows)
        self._plan_tree(outcomes)
        if outcomes is None:
            draft, self.ahead, self.tree = self._copy(), None, None
            self.is_copy, self.draft = draft is not None, self.canvas[self.rows, :0] if draft is None else draft
        elif self.ahead is None:
            self._draft(self.canvas.new_empty(0), torch.full_like(self.rows, -1))
        if self.tree is not None and outcomes:
            outcomes = []  # from the next draft on
        block, ends = torch.cat([self.token[:, None], self.draft], -1), [outcome + 1 for outcome in outcomes or ()]
        b = block.shape[1]
        if self.tree is None:
            sees = torch.ones((b, b), dtype=torch.bool, device=block.device).tril().expand(rows, -1, -1)
        else:
            sees = self.tree.sees
        allowed = torch.cat([self.valid[:, None].expand(-1, b, -1), sees], -1)
        place = self.length[:, None] + sees.sum(-1) - 1
        logits = self._forward(block, place, allowed, b, ends)
        target, drafts = logits[:, :b], logits[:, b:].view(rows, len(ends), self.block_length - 1, logits.shape[-1])
        accepted, last, order, token, finite = self._accept(target)
        self.accepted.append(torch.full_like(self.done, -1))
        unfinished = self._write(block if order is None else block.gather(-1, order), accepted + 1)
        # Here the host waits for the device; what is read later is there already.
        most, in_order = torch.stack([torch.where(finite, accepted.max() + 1, 0), (last == accepted).all()]).tolist()
        check_decodable(most > 0)
        if order is not None and not in_order:
            reorder_columns(self.cache, order, most)
        if dead := b + self.block_length * len(ends) - most:
            self.cache.crop(-dead)
        kept = torch.arange(most, device=block.device) <= accepted[:, None]
        self.valid = torch.cat([self.valid, kept], -1)
        self.length, self.token = self.length + accepted + 1, token
        stay = self._leave(unfinished)
        accepted, drafts = accepted[stay], drafts[stay]
        if self.is_copy:
            self.copies.add(accepted.tolist())
        if outcomes is None or not self.rows.numel():
            return
        self.counts += torch.bincount(accepted, minlength=self.block_length)
        if self.schedule is not None and not self.is_copy:
            self._learn(accepted, stay, order)
        chosen = torch.full_like(accepted, -1)
        for number, outcome in enumerate(outcomes):
            chosen[accepted == outcome] = number
        self._draft(drafts, chosen)

    def _accept(
        self, target: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]:
        """From logits (B, m + 1, V): (B,) tokens accepted, (B,) the row of the last of them, (B, m + 1) rows in the order of the text if
        they are those of a tree, (B,) the token after them, and () bool, whether it was chosen from numbers."""
        order, finite = None, True  # a wrong draft is not accepted
        if self.settings.temperature:
            n = self.draft.shape[1]
            noise = self._noise(MASK_STREAM, n, 1), self._noise(ORDER_STREAM, n + 1, 1)
            scores = warped(target, self.settings).softmax(-1)
            accepted, token = accept_sampled(self.draft, self.draft_probs, scores, *noise)
            finite = self.draft_probs[..., 0].isfinite().all()
        elif self.tree is None:
            scores, (accepted, token) = target, accept_greedy(self.draft, target)
        else:
            scores, (accepted, order, token) = target, accept_tree(self.tree, target)
        last = accepted if order is None else order.gather(-1, accepted[:, None])[:, 0]
        finite = finite & _is_finite(scores[torch.arange(len(token), device=token.device), last], token)
        return accepted, last, order, token, finite

    def _learn(self, accepted: torch.Tensor, stay: torch.Tensor, order: torch.Tensor | None) -> None:
        """Tells the schedule how far drafts were right, of texts that go on."""
        if order is None:
            self.schedule.learn(accepted.tolist(), self.ahead[stay].tolist())
            return
        n, right, ends = self.draft.shape[1], [], []
        read = torch.cat([accepted[:, None], order[stay], self.tree.ranks[stay], self.tree.chain[stay]], -1).tolist()
        for length, *row in read:
            path, ranks, chain = [at - 1 for at in row[1 : length + 1]], row[n + 1 : 2 * n + 1], row[2 * n + 1 :]
            right.append([ranks[at] for at in path])
            end = sum(chain[at] for at in path)
            ends.append((end, end < sum(chain) or end == self.block_length - 1))
        self.schedule.learn_tree(right, n, ends)

    def _write(self, tokens: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
        """Writes the first `count` (B,) of `tokens` (B, m) into the canvas, through an end token; (B,) bool, rows that go on."""
        ends = torch.isin(tokens, self.eos) & (torch.arange(tokens.shape[1], device=count.device) < count[:, None])
        ended, end, before = ends.any(-1), ends.long().argmax(-1, keepdim=True), self.done[self.rows]
        n = torch.where(ended, end[:, 0] + 1, count).minimum(self.settings.max_new_tokens - before)
        canvas = self.canvas[self.rows]
        offset = torch.arange(canvas.shape[1], device=n.device) - (self.prompt_length + before)[:, None]
        written = tokens.gather(-1, offset.clamp(0, tokens.shape[1] - 1))
        canvas = torch.where((offset >= 0) & (offset < n[:, None]), written, canvas)
        # Behind the end token the canvas is filled with it.
        self.canvas[self.rows] = torch.where(ended[:, None] & (offset >= n[:, None]), tokens.gather(-1, end), canvas)
        last = self.accepted[-1]
        last[self.rows] = torch.where(n > 0, last[self.rows].clamp(min=0) + n, last[self.rows])
        self.done[self.rows] = before + n
        goes_on = ~ended & (self.done[self.rows] < self.settings.max_new_tokens)
        return goes_on if self.gone is None else goes_on & ~self.gone[self.rows]

    def _leave(self, unfinished: torch.Tensor) -> torch.Tensor:
        """Places of the rows that go on: unfinished ones, (B,) bool, whose next token, the base's own already, does not end them."""
        over = torch.isin(self.token, self.eos) | (self.done[self.rows] + 1 >= self.settings.max_new_tokens)
        goes_on = self._write(self.token[:, None], (over & unfinished).long())
        stay = (goes_on & unfinished).nonzero().squeeze(-1)
        if len(stay) < len(self.rows):
            self.rows, self.token, self.length = self.rows[stay], self.token[stay], self.length[stay]
            self.valid = self.valid[stay]
            if stay.numel():
                self.cache.batch_select_indices(stay)
        return stay


def copied(ids: torch.Tensor, end: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What followed where the last three tokens, else the last two, stood before, most recently; past the end it begins again.

    Args:
        ids: (B, L) texts.
        end: (B,) columns of their last tokens.
        n: tokens to copy.

    Returns:
        (B, n) tokens, and (B,) bool, whether there was such a place.
    """
    end, column = end[:, None], torch.arange(ids.shape[1], device=ids.device)
    same = [ids.roll(back, -1) == ids.gather(-1, (end - back).clamp(min=0)) for back in range(3)]
    two = same[0] & same[1] & (column > 0) & (column < end)
    place = torch.where(two, column + ids.shape[1] * (same[2] & (column > 1)), -1).amax(-1, keepdim=True)
    at = place % ids.shape[1]
    source = at + 1 + torch.arange(n, device=ids.device) % (end - at).clamp(min=1)
    return ids.gather(-1, source.clamp(max=ids.shape[1] - 1)), place[:, 0] >= 0


def _is_finite(scores: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    """() bool, whether the tokens (B,) have finite scores (B, V): a NaN is the best of its logits, and is in all of its probabilities."""
    return scores.gather(-1, token[:, None]).isfinite().all()
