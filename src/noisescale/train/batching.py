"""A batch sampler whose batch size may change during an epoch, and that can be resumed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sized
from typing import Any

import torch
from torch.utils.data import IterableDataset, Sampler

from noisescale.errors import InvalidInputError, nearest
from noisescale.train.arguments import take_state, whole
from noisescale.train.global_batch import (
    START,
    GlobalBatch,
    Place,
    require_shares,
    share,
    step_through,
)
from noisescale.train.loader_pass import LoaderPass
from noisescale.train.replicas import replicas_here
from noisescale.train.shuffling import order_of
from noisescale.train.size_steps import SizeSteps

LAST = ("keep", "drop", "carry")
_SAME = ("dataset_size", "seed", "shuffle", "last")
_PLACE = ("epoch", "offset", "position", "number")


class ResizableBatchSampler(Sampler[list[int]]):
    """Batches of a shuffled data set whose size may change at any batch.

    For ``DataLoader(data, batch_sampler=sampler)``. All replicas walk through one sequence of
    global batches; each takes its consecutive share of every batch. So the sequence depends on
    the seed and the batch sizes only, not on replicas, workers or prefetching.

    A loader draws batches ahead of the loop. What counts here is what the loop has trained on:
    call :meth:`advance` (or ``BatchSizeSchedule.step``) after every optimizer step.
    ``position``, ``batch_size`` and ``state_dict`` are the loop's, never the loader's.

    An iteration goes from where the loop is to the end of the epoch. After a ``break`` the next
    one goes on there; ``set_epoch`` of another epoch leaves the rest out.

    Attributes:
        position: examples in the batches trained on, over all replicas and epochs.
        epoch: epoch of the batch that the loop has, or gets next.

    Args:
        data: a map-style data set, or its number of examples.
        batch_size: global batch size in examples, or a function from the position where a batch
            begins to its size. The function must say the same whenever it is asked.
        micro_batch_size: in place of ``batch_size`` where gradients are accumulated: examples
            that each replica takes per pass.
        seed: of the shuffling; each epoch has an order of its own.
        shuffle: False keeps the data set's order.
        last: what becomes of an epoch's last examples where they make no full batch: ``keep``
            (a smaller batch), ``drop``, or ``carry`` (the batch is filled from the next epoch).
        lead: batches from a :meth:`set_batch_size` to the first one of the new size; at least
            ``num_workers * prefetch_factor`` of the loader.
        num_replicas: devices that average their gradients; torch.distributed's world, or 1.
        rank: this replica's number; torch.distributed's, or 0.
        uneven_shares: allow batches that replicas cannot share evenly; multiply the loss by
            :attr:`loss_scale` then, since averaging over replicas would weigh examples unequally.

    Raises:
        InvalidInputError: an argument is out of its range, the data are an IterableDataset, or
            the last batch of every epoch would have no equal shares.

    >>> sampler = ResizableBatchSampler(10, batch_size=2, shuffle=False)
    >>> batches = iter(sampler)
    >>> next(batches), sampler.advance().size, sampler.position
    ([0, 1], 2, 2)
    >>> sampler.set_batch_size(5)
    >>> [(batch, sampler.advance().size) for batch in batches]
    [([2, 3, 4, 5, 6], 5), ([7, 8, 9], 3)]
    """

    def __init__(
        self,
        data: Sized | int,
        batch_size: int | Callable[[int], int] | None = None,
        *,
        micro_batch_size: int | None = None,
        seed: int = 0,
        shuffle: bool = True,
        last: str = "keep",
        lead: int = 0,
        num_replicas: int | None = None,
        rank: int | None = None,
        uneven_shares: bool = False,
    ) -> None:
        self.dataset_size = _examples(data)
        self.num_replicas, self.rank = replicas_here(num_replicas, rank)
        self.seed, self.shuffle = whole("seed", seed, least=0), bool(shuffle)
        if last not in LAST:
            raise InvalidInputError(f"last {last!r}", "not a policy", nearest(str(last), LAST))
        self.last = last
        self.lead = whole("lead", lead, least=0)
        self._uneven = uneven_shares
        if last == "keep" and not uneven_shares and self.dataset_size % self.num_replicas:
            # Known now, not at the end of the first epoch, hours later.
            raise InvalidInputError(
                f"an epoch of {self.dataset_size} examples over {self.num_replicas} replicas",
                "its last batch has no equal shares",
                "choose last='drop' or 'carry', or uneven_shares=True and multiply the loss by"
                " loss_scale",
            )
        if (batch_size is None) == (micro_batch_size is None):
            raise InvalidInputError(
                "batch_size and micro_batch_size", "one of the two is required", "give one"
            )
        self.micro_batch_size = micro_batch_size
        if micro_batch_size is not None:
            batch_size = whole("micro_batch_size", micro_batch_size) * self.num_replicas
        self._sizes: SizeSteps | Callable[[int], int] = (
            batch_size if callable(batch_size) else SizeSteps(self._allowed(batch_size))
        )
        self._taken = START
        self._orders: dict[int, torch.Tensor] = {}
        self._pass = LoaderPass(START)

    @property
    def position(self) -> int:
        """Examples in the batches trained on, over all replicas and epochs."""
        return self._taken.position

    @property
    def epoch(self) -> int:
        """Epoch of the batch that the loop has, or gets next."""
        return self._coming().start.epoch

    @property
    def batch_size(self) -> int:
        """Global size of the batch that the loop has, or gets next: as seen, not as asked."""
        return self._coming().size

    @property
    def last_asked(self) -> int:
        """Global size most recently set, which batches drawn ahead may not have yet."""
        steps = self._sizes
        return steps.latest if isinstance(steps, SizeSteps) else self.nominal_batch_size

    @property
    def nominal_batch_size(self) -> int:
        """Global size meant for that batch, were it not cut short by the epoch's end."""
        return self._size_at(self._coming().start.position)

    @property
    def local_batch_size(self) -> int:
        """Examples of the batch that the loop has, or gets next, on this replica."""
        first, stop = share(self._coming().size, self.rank, self.num_replicas)
        return stop - first

    @property
    def loss_scale(self) -> float:
        """What this replica's mean loss is multiplied by; 1 where shares are even.

        ``replicas x own examples / global examples``: the replicas' average is then the mean
        over all examples.
        """
        return self.num_replicas * self.local_batch_size / self._coming().size

    def check_batch_size(self, size: int) -> None:
        """Refuse a global batch size that cannot be made here.

        Raises:
            InvalidInputError: it is larger than the data, or replicas cannot share it.
        """
        self._allowed(size)

    def set_batch_size(self, size: int, *, at: int | None = None) -> None:
        """Change the global batch size from a defined position on; on all replicas alike.

        Args:
            size: examples per batch over all replicas.
            at: position; batches that begin there or later have the new size. By default
                the position that is ``lead`` batches after what the loop has trained on.

        Raises:
            InvalidInputError: the size is out of its range, the loader has already drawn a
                batch that begins there, or sizes follow a function or a micro-batch.
        """
        steps = self._steps_of_its_own()
        size = self._allowed(size)
        start = self._after(self.lead) if at is None else whole("at", at, least=0)
        if start < self._pass.settled:
            raise InvalidInputError(
                f"batch_size {size} from position {start} on",
                f"batches that begin below {self._pass.settled} are drawn already",
                "give lead=num_workers * prefetch_factor, or a later position",
            )
        steps.change(size, start)

    def follow(self, size_at: Callable[[int], int]) -> None:
        """Take every batch's size from a function of the position where it begins.

        Args:
            size_at: must say the same whenever it is asked.

        Raises:
            InvalidInputError: a micro-batch is set, or batches are drawn already.
        """
        self._refuse_micro_batches()
        if self._pass.drawn:
            raise InvalidInputError(
                "a schedule for a sampler in use",
                "sizes must be known before batches are drawn",
                "make the schedule before iterating over the loader",
            )
        self._sizes = size_at

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch, as hosts ask for; the epoch at hand goes on where it is.

        Args:
            epoch: from 0.
        """
        if whole("epoch", epoch, least=0) != self.epoch:
            self._taken = self._taken._replace(epoch=epoch, offset=0)
            self._pass = LoaderPass(self._taken)

    def advance(self) -> GlobalBatch:
        """Count the batch that the loop has as trained on.

        Returns:
            Where it began, where it ended and its global size.

        Raises:
            InvalidInputError: no batch was drawn that is not counted yet, or it is not called
                for every batch.
        """
        batch = self._pass.count()
        self._taken = batch.stop
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Return where the loop is, as plain values; take it between optimizer steps."""
        names = {name: getattr(self, name) for name in _SAME}
        place = dict(zip(_PLACE, self._taken, strict=True))
        steps = self._sizes
        sizes = steps.saved(self.position) if isinstance(steps, SizeSteps) else []
        return {"version": 1, **names, **place, "sizes": sizes, "per_pass": self._per_pass}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on exactly where a state was taken, under any number of replicas and workers.

        Args:
            state: what ``state_dict()`` returned.

        Raises:
            InvalidInputError: it is of other data, another seed or another policy.
        """
        same = {name: getattr(self, name) for name in _SAME}
        if self.last != "carry":
            # Where an epoch's passes end depends on what one takes.
            same["per_pass"] = self._per_pass
        take_state(state, "ResizableBatchSampler", {*same, *_PLACE, "sizes", "per_pass"}, same)
        place = Place(*(whole(name, state[name], least=0) for name in _PLACE))
        carried = self.micro_batch_size is not None or state["per_pass"] is not None
        if isinstance(self._sizes, SizeSteps) and not carried:
            self._sizes = SizeSteps.from_saved(state["sizes"])
            self._allowed(self._sizes.at(place.position))
        self._taken = place
        self._pass = LoaderPass(place)

    def __len__(self) -> int:
        """Batches of the iteration at hand, or of the next one, by the sizes known now."""
        place = self._taken if self._pass.is_over else self._pass.began
        return sum(1 for _ in self._walk(place))

    def __iter__(self) -> Iterator[list[int]]:
        """Yield this replica's indices, batch by batch, to the end of the epoch."""
        if self._pass.was_in_vain:
            raise InvalidInputError(
                "an epoch of which no batch was counted",
                "the sampler must be told what was trained on",
                "call BatchSizeSchedule.step() or sampler.advance() after every optimizer step",
            )
        # What was drawn and not counted is drawn again. An iterator of before has its own pass.
        drawing = self._pass = LoaderPass(self._taken, self._pass)
        for batch in self._walk(self._taken):
            indices = self._indices(batch)
            drawing.draw(batch)
            yield indices
        drawing.ended = True

    def _walk(self, place: Place) -> Iterator[GlobalBatch]:
        """Yield the batches from a place to the end of its epoch."""
        batch = self._batch_at(place)
        if batch is None:  # nothing is left that makes a batch
            place = place._replace(epoch=place.epoch + 1, offset=0)
            batch = self._batch_at(place)
        while batch is not None:
            yield batch
            ended = batch.stop.epoch != place.epoch
            batch = None if ended else self._batch_at(batch.stop)

    def _batch_at(self, place: Place) -> GlobalBatch | None:
        size = self._allowed(self._size_at(place.position))
        return step_through(place, size, self.dataset_size, self.last)

    def _coming(self) -> GlobalBatch:
        drawn = self._pass.drawn
        return drawn[0] if drawn else next(self._walk(self._taken))

    def _after(self, batches: int) -> int:
        """Position where the batch begins that comes so many after what was trained on."""
        place, left = self._taken, batches
        while left:
            for batch in self._walk(place):
                place, left = batch.stop, left - 1
                if not left:
                    break
        return place.position

    def _size_at(self, position: int) -> int:
        steps = self._sizes
        return steps.at(position) if isinstance(steps, SizeSteps) else steps(position)

    def _indices(self, batch: GlobalBatch) -> list[int]:
        first, stop = share(batch.size, self.rank, self.num_replicas)
        require_shares(batch.size, self.num_replicas, uneven=self._uneven)
        begin = batch.start.offset
        rest = self.dataset_size - begin
        order = self._order(batch.start.epoch)
        own: list[int] = order[begin + first : begin + min(stop, rest)].tolist()
        if stop > rest:
            following = self._order(batch.start.epoch + 1)
            own += following[max(first - rest, 0) : stop - rest].tolist()
        return own

    def _order(self, epoch: int) -> torch.Tensor:
        if epoch not in self._orders:
            # At most two epochs are needed at once.
            self._orders = {e: o for e, o in self._orders.items() if e == epoch - 1}
            self._orders[epoch] = order_of(
                self.dataset_size, self.seed, epoch, shuffle=self.shuffle
            )
        return self._orders[epoch]

    @property
    def _per_pass(self) -> int | None:
        return None if self.micro_batch_size is None else self.micro_batch_size * self.num_replicas

    def _allowed(self, wanted: Any) -> int:
        size = whole("batch_size", wanted)
        if size > self.dataset_size:
            raise InvalidInputError(
                f"batch_size {size}",
                f"larger than the data, which hold {self.dataset_size} examples",
                f"give at most {self.dataset_size}",
            )
        require_shares(size, self.num_replicas, uneven=self._uneven)
        return size

    def _refuse_micro_batches(self) -> None:
        if self.micro_batch_size is not None:
            raise InvalidInputError(
                "a batch size for a sampler of micro-batches",
                "the number of micro-batches per update carries the batch size",
                "call GradientAccumulation.set_batch_size, or make the sampler with batch_size",
            )

    def _steps_of_its_own(self) -> SizeSteps:
        self._refuse_micro_batches()
        if isinstance(self._sizes, SizeSteps):
            return self._sizes
        raise InvalidInputError(
            "set_batch_size of a sampler that follows a schedule",
            "the schedule says the size",
            "change the schedule, or make the sampler with a number",
        )


def _examples(data: Any) -> int:
    if isinstance(data, IterableDataset):
        raise InvalidInputError(
            "an IterableDataset",
            "a batch sampler needs data that can be indexed",
            "change the accumulation instead: GradientAccumulation over micro-batches",
        )
    if isinstance(data, Sized):
        return whole("number of examples", len(data))
    return whole("number of examples", data)
