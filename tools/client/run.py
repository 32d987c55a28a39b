"""One run of `marina predict`: each answer to every output, in order."""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, TextIO

from tools.client.answer import Answer, Detection
from tools.client.naming import Stems
from tools.client.outputs import Annotated, Closed, Coco, Crops, Csv, JsonLines, Output, Result, Table, YoloText
from tools.errors import ToolError
from tools.progress import Progress
from tools.video.overlay import Overlay

if TYPE_CHECKING:
    from tools.client.client import Asked
    from tools.client.command import PredictSettings
    from tools.client.sources import Film

STREAMED: dict[str, Callable[[TextIO], Output]] = {"table": Table, "jsonl": JsonLines, "csv": Csv, "coco": Coco}


class Run:
    """counts: of pictures and frames, detections, and pictures without an answer."""

    def __init__(self, settings: "PredictSettings", progress: Progress):
        self._settings = settings
        self._progress = progress
        # Lines on a terminal are progress enough, and would be mixed with it.
        self._shows_progress = not sys.stdout.isatty() or settings.format in ("coco", "yolo")
        self._stems = Stems()
        self._film: Film | None = None
        self._stem = ""
        self._overlay = self._new_overlay()
        self.pictures = self.detections = self.failures = 0

    def through(self, results: "Iterator[Asked]") -> int:
        """The exit code of the command. What was there before an interrupt is written well."""
        interrupted = False
        try:
            with ExitStack() as stack:
                outputs = [stack.enter_context(output) for output in self._outputs()]
                # Before the outputs, so that nothing is under way when they end.
                answers = stack.enter_context(closing(results))  # type: ignore[type-var]  # a generator
                try:
                    with suppress(Closed):
                        self._take_all(answers, outputs)
                except KeyboardInterrupt:
                    interrupted = True
            sys.stdout.flush()
        except ToolError as error:
            # Such as a film that has no frame yet.
            if not interrupted:
                raise
            self._tell(str(error))
        except BrokenPipeError:
            raise
        except OSError as error:
            try:
                sys.stdout.flush()
            except OSError:
                # Lest Python tries, and complains, once more at its end.
                with suppress(OSError):
                    sys.stdout.close()
            raise ToolError(
                f"{error.filename or 'the output'} cannot be written ({error.strerror or error}); make room, or write"
                " elsewhere"
            ) from error
        self._end_film()
        told = f"{self.pictures} pictures, {self.detections} detections"
        self._tell(told + (f"; {self.failures} without an answer" if self.failures else ""))
        if interrupted:
            raise KeyboardInterrupt
        return 1 if self.failures else 0

    def _outputs(self) -> list[Output]:
        settings = self._settings
        outputs: list[Output] = []
        if settings.format in STREAMED:
            outputs.append(STREAMED[settings.format](sys.stdout))
        if settings.save is not None:
            outputs.append(Annotated(settings.save))
            if settings.format == "yolo":
                outputs.append(YoloText(settings.save))
            if settings.save_crops:
                outputs.append(Crops(settings.save))
        if settings.view:
            from tools.client.window import Window

            outputs.append(Window())
        return outputs

    def _take_all(self, answers: "Iterator[Asked]", outputs: list[Output]) -> None:
        for asked in answers:
            if self._shows_progress:
                self._progress.advance()
            if asked.answer.error is not None:
                self.failures += 1
                self._tell(f"{asked.answer.source}: {asked.answer.error}")
                for output in outputs:
                    output.fail(asked.answer)
                continue
            self._begin(asked)
            result = Result(asked, self._followed(asked), self._stem, self._overlay)
            self.pictures += 1
            self.detections += len(result.answer.detections)
            for output in outputs:
                output.add(result)

    def _begin(self, asked: "Asked") -> None:
        film = asked.shot.film
        if film is not None and film is self._film:
            return
        self._end_film()
        self._film = film
        self._stem = self._stems.of(asked.shot.source)
        if film is not None:
            # Objects of one video are not those of another.
            self._overlay = self._new_overlay()

    def _end_film(self) -> None:
        if self._film is not None and self._film.dropped:
            self._tell(f"{self._film.source}: {self._film.dropped} frames came too fast and were left out")
        self._film = None

    def _followed(self, asked: "Asked") -> Answer:
        answer = asked.answer
        if not self._settings.track or asked.shot.film is None:
            return answer
        found = self._overlay.track([one.to_json() for one in answer.detections], asked.shot.seconds)
        return replace(answer, detections=tuple(map(Detection.from_json, found)))

    def _new_overlay(self) -> Overlay:
        settings = self._settings
        return Overlay((), settings.line_width, settings.hide_labels, settings.hide_scores, track=settings.track)

    def _tell(self, line: str) -> None:
        clear = "\r\x1b[K" if sys.stderr.isatty() else ""
        print(f"{clear}marina: {line}", file=sys.stderr)
