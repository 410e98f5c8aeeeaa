#!/usr/bin/env python3
"""A page on this machine to try a student on: a prompt, steps, a seed; the teacher's video beside the student's.

    python inference/web.py --model outputs/demo/student --teacher tiny-wan
    python inference/web.py --model STUDENT --port 8000       # the student alone; an image-to-video model is shown an image

It needs gradio. The page is for this machine alone; nothing is sent elsewhere. Videos lie in --out.
"""

import argparse
import dataclasses
import importlib.util
import tempfile
import time
from pathlib import Path

import torch

from dmd_ds.commands import command_parser
from dmd_ds.data.video import read_image, write_video
from dmd_ds.errors import UserError, one_line_errors
from dmd_ds.generation import Settings, VideoModel

MOST_STEPS = 50


@dataclasses.dataclass(frozen=True)
class Maker:
    """Makes the page's videos, each in a file of its own."""

    student: VideoModel
    teacher: VideoModel | None
    out: Path

    def make(self, prompt: str, steps: int, seed: int, image: str | None, with_teacher: bool) -> tuple[Path, Path | None, str]:
        """The student's video, the teacher's of the same prompt, seed and image where that is asked for, and how long each took.

        `UserError` for what the models cannot make.
        """
        settings = self.student.settings.changed(steps=steps)
        student, said = self.video("student", self.student, settings, prompt, seed, image)
        if self.teacher is None or not with_teacher:
            return student, None, said
        size = {name: getattr(settings, name) for name in ("frames", "height", "width", "fps")}
        teacher, teacher_said = self.video("teacher", self.teacher, self.teacher.settings.changed(**size), prompt, seed, image)
        return student, teacher, f"{said}; {teacher_said}"

    def video(self, name: str, model: VideoModel, settings: Settings, prompt: str, seed: int, image: str | None) -> tuple[Path, str]:
        if model.image_encoder is not None and image is None:
            raise UserError(f"{model.folder}: an image-to-video model, which needs an image")
        shown = None
        if model.image_encoder is not None:
            shown = model.condition([read_image(Path(image), settings.height, settings.width)], settings)
        began = time.monotonic()
        (video,) = model.videos([prompt], [seed], settings, image=shown).numpy()
        seconds = time.monotonic() - began
        file = self.out / f"{time.strftime('%Y%m%d-%H%M%S')}-{time.monotonic_ns() % 10**6:06d}-{name}.mp4"
        write_video(file, video, settings.fps)
        return file, f"{name} {seconds:.1f} s, {model.evaluations(settings)} evaluations"


def page(maker: Maker):
    """The page, a gradio `Blocks`."""
    import gradio

    settings, takes_image = maker.student.settings, maker.student.image_encoder is not None

    def make(prompt, steps, seed, with_teacher, image=None):
        try:
            student, teacher, said = maker.make(prompt, int(steps), int(seed), image, with_teacher)
        except UserError as error:
            raise gradio.Error(str(error)) from error
        return str(student), teacher and str(teacher), said

    with gradio.Blocks(title="dmd_ds", analytics_enabled=False) as blocks:
        gradio.Markdown(f"# {maker.student.folder.name}\n{settings.frames} frames of {settings.width} x {settings.height}")
        with gradio.Row():
            prompt = gradio.Textbox(label="Prompt", lines=2, scale=3)
            steps = gradio.Slider(1, MOST_STEPS, settings.steps, step=1, label="Steps of the student")
            seed = gradio.Number(0, precision=0, label="Seed")
        image = gradio.Image(type="filepath", label="First frame", visible=takes_image)
        with_teacher = gradio.Checkbox(maker.teacher is not None, label="Teacher beside it", visible=maker.teacher is not None)
        button = gradio.Button("Make", variant="primary")
        with gradio.Row():
            student = gradio.Video(label="Student", autoplay=True, loop=True)
            teacher = gradio.Video(label="Teacher", autoplay=True, loop=True, visible=maker.teacher is not None)
        said = gradio.Markdown()
        inputs = [prompt, steps, seed, with_teacher, *([image] if takes_image else [])]
        gradio.on([button.click, prompt.submit], make, inputs, [student, teacher, said])
    return blocks


def check_gradio() -> None:
    if importlib.util.find_spec("gradio") is None:
        raise UserError("gradio is not installed, which this page is made with; pip install gradio")


def parse() -> argparse.Namespace:
    parser = command_parser(__doc__)
    parser.add_argument("--model", required=True, help="diffusers Wan folder of the student")
    parser.add_argument("--teacher", help="that of its teacher, or the name of a shipped one; both are held in memory")
    parser.add_argument("--port", type=int, default=7860, help="of this machine (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="the folder for the videos (default: one that goes with the machine's next start)")
    return parser.parse_args()


def main() -> None:
    a = parse()
    with one_line_errors():
        check_gradio()
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        out = a.out or Path(tempfile.mkdtemp(prefix="dmd_ds-"))
        out.mkdir(parents=True, exist_ok=True)
        teacher = VideoModel(a.teacher, device) if a.teacher else None
        maker = Maker(VideoModel(a.model, device), teacher, out)
    page(maker).launch(server_name="127.0.0.1", server_port=a.port, allowed_paths=[str(out.resolve())])


if __name__ == "__main__":
    main()
