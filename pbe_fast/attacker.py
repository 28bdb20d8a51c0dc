"""Step 1a at the hardware's speed: `pbe_fast.pgd.pgd_attack` as an object that lasts for a run."""

from __future__ import annotations

import itertools
import math
import time
import weakref
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pbe_fast.attack_batch import AttackBatch, per_image
from pbe_fast.config import PGDConfig
from pbe_fast.engine.compiling import Forward, compiled, worth_compiling
from pbe_fast.engine.folding import FrozenCopy
from pbe_fast.engine.machine import images_per_pass
from pbe_fast.engine.replay import Recorder, Replay
from pbe_fast.errors import InputError
from pbe_fast.kernels.pgd_step import pgd_step_
from pbe_fast.models.normalized import Normalized
from pbe_fast.pgd import input_gradient, random_start, random_windows
from pbe_fast.smoothness import smooth_step_, spread_matrices


class PGD:
    """The attack as an object for a whole run: it works on a frozen copy of the model, see `FrozenCopy`.

    On a GPU all K steps are one CUDA graph, captured once, and the last batch is padded; on a CPU the same loop runs as
    it is. Where ``planned`` is enough work to pay for it, the copy is compiled (docs/engine.md).

    Args:
        model: Returns (B, K) logits for float images in [0, 1]. It is not changed, and may be in train mode: the copy
            is in eval mode.
        config: Norm, radius, steps, restarts and the like.
        image_shape: (C, H, W).
        batch_size: Images at a time, at most.
        dtype: Of the matrix products; the images stay in float32.
        seed: Of the random starts and windows.
        planned: Images that will be attacked in the whole run, where that is known.
        beside: Another attack on the same model, with images, batches and dtype of the same kind: one copy and one set
            of buffers serve both, which never run at the same time.
        recorder: Of whom the attack serves, and never runs at the same time; one of its own, if not given.
    """

    def __init__(
        self,
        model: nn.Module,
        config: PGDConfig,
        *,
        image_shape: tuple[int, ...],
        batch_size: int = 128,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        planned: int = 0,
        beside: PGD | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        self.config = config
        self.image_shape = tuple(image_shape)
        self._seed = seed
        self._planned = planned
        self._calls = 0
        net, self._mean, self._std = _apart(model, self.image_shape[0])
        self._copy: FrozenCopy = beside._copy if beside else FrozenCopy(net, dtype=dtype, image_shape=self.image_shape)
        self._forward: Forward = self._copy
        # What the compiler gains on oneDNN's convolutions with what follows them, it loses on images side by side.
        self._decided = config.compile != "auto" or planned == 0 or self._copy.has_post_ops
        device = next(itertools.chain(net.parameters(), net.buffers()), torch.empty(0)).device
        self._device = device
        self._recorder = recorder or Recorder(device)
        # A graph and compiled code have one batch size.
        self._fixed = device.type == "cuda"
        rows = batch_size if self._fixed or self._copy.has_post_ops else min(batch_size, images_per_pass())
        input_dtype = dtype if self._mean is not None else None
        self._batch: AttackBatch = (
            beside._batch if beside else AttackBatch.empty(rows, self.image_shape, device, input_dtype)
        )
        windows = None
        if config.window is not None:
            windows = torch.zeros((rows, 1, *self.image_shape[1:]), dtype=torch.bool, device=device)
        self._batch = replace(self._batch, windows=windows)
        self._spread = None if config.grid is None else spread_matrices(config.grid, self.image_shape, device)
        self._key, self._restart = (torch.zeros((), dtype=torch.int64, device=device) for _ in range(2))
        self._make_replays()
        if config.compile == "on":
            self._compile()

    def refresh(self, model: nn.Module) -> None:
        """Attacks the current weights and BN statistics of ``model`` from now on."""
        self._copy.refresh(_apart(model, self.image_shape[0])[0])

    def __call__(
        self, images: Tensor, labels: Tensor, image_ids: Tensor | None = None, *, seed: int | None = None
    ) -> Tensor:
        """Adversarial copies of ``images``; see `pgd_attack`.

        Args:
            images: (B, C, H, W) float32 in [0, 1], of any number.
            labels: (B,) int64.
            image_ids: (B,) int64, the images' numbers in their set: random starts and windows are drawn by them, not by
                the batch.
            seed: Of the random numbers of this call, from 0 to 2^63 - 1; that of the object if not given.

        Returns:
            (B, C, H, W) float32 in [0, 1], in the memory layout of ``images``.

        Raises:
            InputError: Images of another shape, or a random start or window without ids.
        """
        if tuple(images.shape[1:]) != self.image_shape:
            raise InputError("images to attack", got=tuple(images.shape), accepted=f"(B, {self.image_shape})")
        if image_ids is None:
            if self.config.draws:
                raise InputError("image_ids of a random start or window", got=None, accepted="(B,) int64")
            image_ids = torch.zeros_like(labels)
        if len(images) == 0:
            return images.clone()
        self._key.fill_(self._seed if seed is None else seed)
        self._calls += 1
        # The first call warms up; on a GPU all up to the capture are several times slower than those to come.
        measured = not self._decided and self._calls > 1 and self._replay.settled
        start = self._clock() if measured else 0.0
        best = self._attack(images, labels, image_ids, 0)
        if self.config.restarts > 1:
            self._try_again(best, images, labels, image_ids)
        if measured:
            self._decide(len(images), self._clock() - start)
        return best

    def _try_again(self, best: Tensor, images: Tensor, labels: Tensor, ids: Tensor) -> None:
        """The other restarts; ``best`` keeps of each image the one with the highest loss."""
        loss, fooled = self._judge(best, labels)
        for restart in range(1, self.config.restarts):
            again: slice | Tensor = (~fooled).nonzero()[:, 0] if self.config.early_stop else slice(None)
            if isinstance(again, Tensor) and len(again) == 0:
                return
            found = self._attack(images[again], labels[again], ids[again], restart)
            new_loss, new_fooled = self._judge(found, labels[again])
            better = new_loss > loss[again]
            best[again] = torch.where(per_image(better), found, best[again])
            loss[again] = torch.where(better, new_loss, loss[again])
            fooled[again] |= new_fooled

    def _attack(self, images: Tensor, labels: Tensor, ids: Tensor, restart: int) -> Tensor:
        self._restart.fill_(restart)
        if self.config.early_stop:
            return self._attack_in_slots(images, labels, ids)
        out = torch.empty_like(images)
        for part in self._parts(len(images)):
            n = part.stop - part.start
            here = self._batch.rows(slice(n))
            for target, source in ((here.images, images), (here.labels, labels), (here.ids, ids)):
                target.copy_(source[part], non_blocking=True)
            if self._fixed:
                # Rows beyond n hold what an earlier batch left there.
                self._run_all()
            else:
                self._run(here)
            out[part] = here.adversarial
        return out

    def _run(self, batch: AttackBatch) -> None:
        """Eq. 5 and 6, K times."""
        self._start(batch)
        for _ in range(self.config.steps):
            gradient, _ = input_gradient(self._forward, batch.model_input, batch.labels)
            self._update(batch, gradient)

    def _start(self, batch: AttackBatch) -> None:
        if self.config.random_start:
            start = random_start(batch.images, batch.ids, self.config, self._key, self._restart)
            batch.adversarial.copy_(start)
        else:
            batch.adversarial.copy_(batch.images)
        if batch.windows is not None:
            batch.windows.copy_(self._windows(batch.images, batch.ids))
        self._set_input(batch)

    def _windows(self, images: Tensor, ids: Tensor) -> Tensor:
        assert self.config.window is not None
        return random_windows(images, ids, self.config.window, self._key, self._restart)

    def _set_input(self, batch: AttackBatch) -> None:
        if batch.model_input is not batch.adversarial:
            batch.model_input.copy_(self._normalised(batch.adversarial))

    def _normalised(self, images: Tensor) -> Tensor:
        if self._mean is None or self._std is None:
            return images
        return (images - self._mean.view(-1, 1, 1)) / self._std.view(-1, 1, 1)

    def _update(self, batch: AttackBatch, gradient: Tensor) -> None:
        if self._spread is not None:
            eps, alpha = self.config.eps, self.config.step_size
            smooth_step_(batch.adversarial, gradient, batch.images, self._spread, eps=eps, alpha=alpha)
            self._set_input(batch)
            return
        if batch.windows is not None:
            gradient = gradient * batch.windows
        apart = None if batch.model_input is batch.adversarial else batch.model_input
        pgd_step_(
            batch.adversarial,
            gradient,
            batch.images,
            apart,
            eps=self.config.eps,
            alpha=self.config.step_size,
            norm=self.config.norm,
            mean=self._mean,
            std=self._std,
        )

    def _attack_in_slots(self, images: Tensor, labels: Tensor, ids: Tensor) -> Tensor:
        """An image leaves its slot when it is misclassified or after K steps, and the next one takes its place."""
        n = len(images)
        starts = (
            random_start(images, ids, self.config, self._key, self._restart) if self.config.random_start else images
        )
        windows = self._windows(images, ids) if self.config.window is not None else None
        # One row more, for slots that have nothing left to do: with fixed sizes they go on computing.
        out = torch.cat([starts, starts[:1]])
        batch = self._batch if self._fixed else self._batch.rows(slice(min(n, len(self._batch))))
        slots = torch.arange(len(batch), device=self._device)
        done = torch.ones_like(slots, dtype=torch.bool)
        ages, following = torch.zeros_like(slots), torch.full_like(slots[:1], len(batch))
        for step in itertools.count(1):
            picture, source = per_image(done), slots.clamp(max=n - 1)
            batch.images.copy_(torch.where(picture, images[source], batch.images))
            batch.labels.copy_(torch.where(done, labels[source], batch.labels))
            batch.adversarial.copy_(torch.where(picture, starts[source], batch.adversarial))
            if windows is not None and batch.windows is not None:
                batch.windows.copy_(torch.where(picture, windows[source], batch.windows))
            self._set_input(batch)
            if self._fixed:
                self._step_all()
            else:
                self._step(batch)
            ages = torch.where(done, 1, ages + 1)
            out.index_copy_(0, slots.clamp(max=n), batch.adversarial)
            done = batch.fooled | (ages >= self.config.steps)
            slots = torch.where(done, following + done.cumsum(0) - 1, slots)
            following = following + done.sum()
            # Asking how many are left stops a GPU, so it is asked once in K steps there.
            if not self._fixed or step % self.config.steps == 0:
                left = (slots < n).nonzero()[:, 0]
                if len(left) == 0:
                    break
                if not self._fixed and len(left) < len(batch):
                    batch, slots, done, ages = batch.rows(left), slots[left], done[left], ages[left]
        return torch.empty_like(images).copy_(out[:n])

    def _step(self, batch: AttackBatch) -> None:
        """One step, except for images that are misclassified already."""
        gradient, logits = input_gradient(self._forward, batch.model_input, batch.labels)
        batch.fooled.copy_(logits.argmax(1) != batch.labels)
        before = batch.adversarial.clone()
        self._update(batch, gradient)
        batch.adversarial.copy_(torch.where(per_image(batch.fooled), before, batch.adversarial))

    @torch.no_grad()
    def _judge(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Loss of each image, and whether it is misclassified."""
        logits = torch.cat([self._copy(self._normalised(images[part])).float() for part in self._parts(len(images))])
        return F.cross_entropy(logits, labels, reduction="none"), logits.argmax(1) != labels

    def _parts(self, n: int) -> Iterator[slice]:
        rows = len(self._batch)
        if not self._fixed:
            # As many batches, of like sizes: two of 40 and 39 rather than of 64 and 15, on one thread.
            rows = math.ceil(n / math.ceil(n / rows))
        yield from (slice(start, min(start + rows, n)) for start in range(0, n, rows))

    @property
    def _replay(self) -> Replay:
        return self._step_all if self.config.early_stop else self._run_all

    def _make_replays(self) -> None:
        # No cycle: what the object holds goes with it, not when the garbage collector comes by.
        own = weakref.proxy(self)
        calls = math.ceil(self._planned / len(self._batch)) * self.config.restarts if self._planned else None
        steps = None if calls is None else calls * self.config.steps
        self._run_all = Replay(lambda: own._run(own._batch), self._recorder, kind="attack", expected=calls)
        self._step_all = Replay(lambda: own._step(own._batch), self._recorder, kind="attack", expected=steps)

    def _compile(self) -> None:
        def try_out(forward: Forward) -> None:
            input_gradient(forward, self._batch.model_input, self._batch.labels)

        forward = compiled(self._copy, try_out)
        if forward is not None:
            self._forward, self._fixed = forward, True
            self._make_replays()

    def _clock(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def _decide(self, images: int, seconds: float) -> None:
        """Compiles if what is left of the planned work, at this speed, pays for it."""
        self._decided = True
        left = self._planned - self._calls * images
        if worth_compiling(left * seconds / images, self._device):
            self._compile()


def _apart(model: nn.Module, channels: int) -> tuple[nn.Module, Tensor | None, Tensor | None]:
    """The network of a `Normalized`, its mean and its std, which the step itself takes; any other model as it is."""
    if type(model) is not Normalized or model._forward_hooks or model._forward_pre_hooks:
        return model, None, None
    if model.mean.numel() not in (1, channels):
        # Of a grey image three means make three channels, which no step does.
        return model, None, None
    # One mean may stand for all channels.
    mean, std = (values.float().flatten().expand(channels).contiguous() for values in (model.mean, model.std))
    return model.net, mean, std
