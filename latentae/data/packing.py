"""Write many shards at once: threads read, check and shrink images, others put them into tars. Decoding leaves Python's lock alone."""

from __future__ import annotations

import io
import itertools
import json
import tarfile
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from latentae.data.decode import MAX_PIXELS, decode_image, image_extension
from latentae.data.shard_index import IndexFiles, ShardEntry, entry_of, scan_shard
from latentae.data.shrinking import shrink
from latentae.errors import ImageError, Interrupted
from latentae.file_names import BAD_SAMPLES
from latentae.files import atomic_file, write_text
from latentae.progress import Progress

__all__ = ["ImageSource", "Members", "Packer", "fill_tar"]


Members = Mapping[str, str | bytes]  # "__key__" -> str, extension -> bytes


class ImageSource(Protocol):
    """Images to be packed, by number. `load` is called by several threads at once."""

    @property
    def place(self) -> str:
        """Where the images are, for the record."""
        ...

    @property
    def sizes(self) -> Sequence[int]:
        """Bytes of each image file."""
        ...

    @property
    def listing(self) -> str:
        """Hex digest that differs where the images are others."""
        ...

    def key(self, number: int) -> str:
        """Key of a sample, unique and as `escape_key` makes them."""
        ...

    def name(self, number: int) -> str:
        """What messages call an image."""
        ...

    def load(self, number: int) -> dict[str, bytes]:
        """Extension -> bytes, the image first. Raises ImageError."""
        ...


def fill_tar(path: Path, samples: Iterable[Members]) -> None:
    """Write samples to a tar; the same samples give the same bytes."""
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, encoding="utf-8") as tar:
        for sample in samples:
            for extension, data in sample.items():
                if extension != "__key__" and isinstance(data, bytes):
                    info = tarfile.TarInfo(
                        f"{sample['__key__']}.{extension}"
                    )  # mtime, uid and gid 0, mode 0o644, no names
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))


@dataclass
class Packer:
    """Packs the images of a source into shards.

    Args:
        source: the images.
        out: folder for the shards.
        resize: short side in pixels that larger images are shrunk to; None leaves files as they are.
        quality: of the JPEGs that shrunk images become; None is PNG.
        skip_bad: leave unreadable images out and put them on record, rather than stop.
        workers: threads that read images.
        max_pixels: of an image; larger ones are errors.
    """

    source: ImageSource
    out: Path
    resize: int | None
    quality: int | None
    skip_bad: bool
    workers: int
    max_pixels: int = MAX_PIXELS
    _stop: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _bad: dict[str, list[str]] | None = None

    def run(self, plan: Sequence[tuple[Path, range]]) -> list[ShardEntry]:
        """Write the shards of a plan that are not there yet, each with its index; whole ones stay.

        Raises:
            ImageError: an image can't be read, without `skip_bad`.
            OutputError: a shard can't be written.
        """
        here = [path.exists() for path, _ in plan]
        total = sum(len(numbers) for _, numbers in plan)
        done = sum(len(numbers) for (_, numbers), there in zip(plan, here, strict=True) if there)
        writers = max(1, min(self.workers, here.count(False)))
        with (
            Progress("packing images", total=total, initial=done) as progress,
            ThreadPoolExecutor(self.workers) as readers,
            ThreadPoolExecutor(writers) as pool,
        ):
            ahead = max(2, 2 * self.workers // writers)
            futures = [
                pool.submit(self._shard, path, numbers, readers, ahead, progress) for path, numbers in plan
            ]
            try:
                for future in as_completed(futures):
                    future.result()
            except BaseException:
                self._stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return [future.result() for future in futures]

    def _shard(
        self, path: Path, numbers: range, readers: ThreadPoolExecutor, ahead: int, progress: Progress
    ) -> ShardEntry:
        if path.exists():
            table = IndexFiles((str(path),), None).find(str(path))
            return (
                entry_of(str(path), table)
                if table is not None and table.record["sha256"]
                else scan_shard(path)
            )
        bad: list[dict[str, str]] = []
        with atomic_file(path) as temporary:
            fill_tar(temporary, self._good(path, numbers, readers, ahead, progress, bad))
            self._record_bad(
                path, bad
            )  # before the shard takes its name: a shard that is there has its record
        return scan_shard(path)

    def _good(
        self,
        path: Path,
        numbers: range,
        readers: ThreadPoolExecutor,
        ahead: int,
        progress: Progress,
        bad: list[dict[str, str]],
    ) -> Iterator[Members]:
        for number, result in zip(numbers, self._ahead(readers, numbers, ahead), strict=True):
            if self._stop.is_set():
                raise Interrupted("packing was stopped; the same command goes on from what is finished")
            try:
                yield result.result()
            except ImageError as error:
                if not self.skip_bad:
                    raise
                name, key = self.source.name(number), self.source.key(number)
                bad.append({"file": name, "key": key, "shard": path.name, "reason": str(error)})
            with self._lock:
                progress.advance()

    def _ahead(self, readers: ThreadPoolExecutor, numbers: range, depth: int) -> Iterator[Future[Members]]:
        """Load images in order, a few ahead: `readers.map` would hold the whole shard in memory."""
        running: deque[Future[Members]] = deque()
        todo = iter(numbers)
        try:
            while True:
                running.extend(
                    readers.submit(self._load, number)
                    for number in itertools.islice(todo, depth - len(running))
                )
                if not running:
                    return
                yield running.popleft()
        finally:
            for future in running:
                future.cancel()

    def _load(self, number: int) -> Members:
        """A sample, its image decoded to be sure that it can be, and shrunk if it shall be."""
        members = self.source.load(number)
        extension, name = image_extension(members), self.source.name(number)
        if extension is None:
            raise ImageError(f"image {name} is of no known kind: found {', '.join(members)}")
        sample: dict[str, str | bytes] = {"__key__": self.source.key(number)}
        if self.resize is None:
            decode_image(members[extension], name, max_pixels=self.max_pixels, short=1)
        elif smaller := shrink(
            members[extension], name, self.resize, self.quality, max_pixels=self.max_pixels
        ):
            del members[extension]
            sample[smaller[0]] = smaller[1]
        return {**sample, **members}

    def _record_bad(self, path: Path, bad: list[dict[str, str]]) -> None:
        """Replace what `bad_samples.jsonl` says of this shard: it may have been written before a run was killed."""
        record = self.out / BAD_SAMPLES
        with self._lock:
            if self._bad is None:
                self._bad = {}
                for line in record.read_text(encoding="utf-8").splitlines() if record.exists() else []:
                    self._bad.setdefault(json.loads(line)["shard"], []).append(line)
            before = self._bad.pop(path.name, [])
            lines = [json.dumps(entry, ensure_ascii=False) for entry in bad]
            if lines:
                self._bad[path.name] = lines
            if lines != before:
                write_text(
                    record, "".join(f"{line}\n" for shard in sorted(self._bad) for line in self._bad[shard])
                )
