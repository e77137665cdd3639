"""Ask one film one question.

    python -m minigrpo.ask --model runs/demo/grounding/final --image film.png \\
        --question "Where is the right lung?"

Prints the answer; if it has boxes, draws them into a copy of the film.
"""

from pathlib import Path

from minigrpo.run.args import answer_early
from minigrpo.run.arguments import AskArguments

if __name__ == "__main__":
    answer_early(AskArguments, __doc__)  # what follows takes seconds to import

from PIL import Image, ImageDraw

from minigrpo.data import Sample, load_image, parse_boxes, split_thinking
from minigrpo.generate import generate
from minigrpo.policy import Policy
from minigrpo.run.args import input_errors, parse_args, run_errors
from minigrpo.run.files import aside


@run_errors(lambda: "The answer is above", "--max_new_tokens")
def main() -> None:
    with input_errors():
        args = parse_args(AskArguments, __doc__)
        try:
            film = load_image(args.image)
        except ValueError as error:
            raise ValueError(f"--image: {error}") from None
        drawn = Path(
            args.output or Path(args.image).with_name(f"{Path(args.image).stem}-boxes.png")
        )
        if drawn.exists():
            raise ValueError(f"{drawn} exists already: give another --output")
        if drawn.suffix.lower() not in (".png", ".jpg", ".jpeg") or not drawn.parent.is_dir():
            raise ValueError(
                f"--output {drawn} can't be written: name a .png or .jpg in a folder that exists"
            )
        policy = Policy.from_pretrained(args.model, device=args.device)
    sample = Sample("asked", args.image, "conversation", args.question, "")
    answer = generate(
        policy,
        policy.encode([sample]),
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
    ).texts[0]
    print(answer)
    if boxes := parse_boxes(split_thinking(answer, policy.template_opens_think)[1], args.box_scale):
        with aside(drawn) as part:
            draw_boxes(film, boxes).save(part, "PNG" if drawn.suffix.lower() == ".png" else "JPEG")
        print(f"boxes drawn into {drawn}")


def draw_boxes(film: Image.Image, boxes: list) -> Image.Image:
    """A copy of the film with its boxes (0..1) in red; boxes that are outside the film or reversed
    can't be drawn.
    """
    film = film.copy()
    pen, (width, height) = ImageDraw.Draw(film), film.size
    for x1, y1, x2, y2 in boxes:
        if 0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1:
            pen.rectangle(
                (x1 * width, y1 * height, x2 * width, y2 * height),
                outline="red",
                width=max(1, width // 160),
            )
    return film


if __name__ == "__main__":
    main()
