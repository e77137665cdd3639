"""Question and answer templates, in our own words, shared by every data set.

A data set turns an annotation into a conversation by drawing a template with its own numpy
Generator, one per sample, so that two conversions of the same data agree word for word. The first
templates of each list are drawn more often: a few common wordings and a long tail, as people ask.
"""

import numpy as np

DETECTION_QUESTIONS = (
    "Box every finding and device on this film.",
    "Find all abnormalities and devices and give their boxes.",
    "Where are the findings of this chest X-ray?",
    "List what is abnormal, each with its box.",
)
DETECTION_ANSWERS = ("I see {listed}.", "Seen: {listed}.", "On this film: {listed}.")

CLASSIFICATION_QUESTIONS = (
    "Which abnormalities does this chest X-ray show?",
    "Name the abnormalities on this film.",
    "List what is abnormal in this chest X-ray, without describing it.",
    "Which findings would you tick for this film?",
)

REPORT_QUESTIONS = (
    "Write the findings of this chest X-ray.",
    "Describe the findings in this chest X-ray.",
    "What does this chest X-ray show?",
    "Report this chest X-ray.",
    "Please dictate the findings section for this film.",
    "Give a radiology report for this image.",
    "Which findings are visible in this chest film?",
    "Read this chest X-ray and write down what you see.",
    "Summarise this chest X-ray as a radiologist would.",
    "What would the findings section say for this image?",
    "Look at the heart, lungs, pleura and bones and report them.",
    "Compose the findings paragraph for this X-ray.",
    "Go through this film and report every finding.",
    "Can you describe this frontal chest image?",
    "Draft the report that belongs to this X-ray.",
)

REGION_QUESTIONS = (
    "Where is the {label}?",
    "Locate the {label}.",
    "Show the {label} on this image.",
    "Draw a box around the {label}.",
    "Give the box of the {label}.",
    "Find the {label} in this chest X-ray.",
    "Mark the {label}.",
    "In which part of the image is the {label}?",
    "Point out the {label}.",
    "Which box holds the {label}?",
    "Can you find the {label}?",
    "Please outline the {label} with a box.",
    "Where on this film do you see the {label}?",
    "Box the {label}, please.",
    "Tell me where the {label} is.",
    "What is the position of the {label}?",
    "Where should I look for the {label}?",
    "Identify the area of the {label}.",
    "Return the location of the {label}.",
    "Where does the {label} lie in this X-ray?",
)

REGION_ANSWERS = (
    "The {label} is located at {boxes}.",
    "The {label} is at {boxes}.",
    "The {label} is found at {boxes}.",
    "The {label} lies at {boxes}.",
    "The {label} can be seen at {boxes}.",
    "You can find the {label} at {boxes}.",
    "Here is the {label}: {boxes}.",
    "The location of the {label} is {boxes}.",
    "The position of the {label} is {boxes}.",
    "The {label} is marked by {boxes}.",
    "The {label} is inside {boxes}.",
    "The {label} is visible at {boxes}.",
    "Look at {boxes} for the {label}.",
    "The area of the {label} is {boxes}.",
    "The {label} is shown at {boxes}.",
    "I see the {label} at {boxes}.",
    "The {label} fills {boxes}.",
    "On this film the {label} is at {boxes}.",
    "The {label} is outlined by {boxes}.",
    "At {boxes} lies the {label}.",
)

# Of a finding that may not be there.
PRESENCE_QUESTIONS = (
    "Is there any {label}? If so, where?",
    "Do you see any {label}? Box it if you do.",
    "Look for any {label} and give its box.",
    "Does this film show any {label}? Where?",
)
ABSENT_ANSWERS = ("There is no {label}.", "No {label} is seen.", "I see no {label}.")

PHRASE_QUESTIONS = (
    'Where is this seen: "{label}"?',
    'Locate the phrase "{label}".',
    'Which part of the image shows "{label}"?',
    'The report says "{label}". Where is that?',
    'Draw a box around what this describes: "{label}".',
    'Find the area that fits "{label}".',
    'Mark the place where one reads "{label}".',
    'Give the location that belongs to "{label}".',
)

PHRASE_ANSWERS = (
    "This is seen at {boxes}.",
    "It is located at {boxes}.",
    "The phrase refers to {boxes}.",
    "That is at {boxes}.",
    "The finding described lies at {boxes}.",
    "It can be found at {boxes}.",
    "The area that fits is {boxes}.",
    "This belongs to {boxes}.",
)


def draw_template(templates, rng: np.random.Generator) -> str:
    """One of `templates`; template k (from 0) has weight 1 / (k + 1)."""
    weights = 1.0 / np.arange(1, len(templates) + 1)
    return templates[rng.choice(len(templates), p=weights / weights.sum())]


def detection_turn(findings: list[tuple[str, str]], rng: np.random.Generator) -> tuple[str, str]:
    """(question, answer) for all findings of a film, each a name and the text of its box."""
    items = [f"{name} at {box}" for name, box in findings]
    listed = " and ".join(filter(None, [", ".join(items[:-1]), items[-1]]))
    return draw_template(DETECTION_QUESTIONS, rng), draw_template(DETECTION_ANSWERS, rng).format(
        listed=listed
    )


def classification_turn(labels: list[str], rng: np.random.Generator) -> tuple[str, str]:
    """(question, answer) for the names of what is present; the answer is the names alone, in the
    order given.
    """
    listed = ", ".join(labels)
    return draw_template(CLASSIFICATION_QUESTIONS, rng), listed[:1].upper() + listed[1:] + "."


def report_question(rng: np.random.Generator) -> str:
    return draw_template(REPORT_QUESTIONS, rng)


def region_turn(label: str, boxes: str, rng: np.random.Generator) -> tuple[str, str]:
    """(question, answer) for a region or an abnormality; `boxes` is the text that `format_boxes`
    wrote.
    """
    question, answer = draw_template(REGION_QUESTIONS, rng), draw_template(REGION_ANSWERS, rng)
    return question.format(label=label), answer.format(label=label, boxes=boxes)


def presence_turn(label: str, boxes: str, rng: np.random.Generator) -> tuple[str, str]:
    """(question, answer) for a finding that may be absent: `boxes` is "" where it is."""
    question = draw_template(PRESENCE_QUESTIONS, rng)
    answer = draw_template(REGION_ANSWERS if boxes else ABSENT_ANSWERS, rng)
    return question.format(label=label), answer.format(label=label, boxes=boxes)


def phrase_turn(phrase: str, boxes: str, rng: np.random.Generator) -> tuple[str, str]:
    """(question, answer) for a phrase of a report; the answer does not repeat the phrase."""
    question, answer = draw_template(PHRASE_QUESTIONS, rng), draw_template(PHRASE_ANSWERS, rng)
    return question.format(label=phrase), answer.format(boxes=boxes)
