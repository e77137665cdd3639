"""Tables 1 to 3 of the paper (arXiv 2512.10691), read off its images: facts about other people's
models on other test sets. Percent, but for RadCliQ and characters; None where the table has no
figure.
"""

REPORTS = (
    "ROUGE-L",
    "BERTScore",
    "CheXbert micro",
    "CheXbert macro",
    "RadGraph F1",
    "GREEN",
    "RadCliQ",
)
TABLE_1 = {
    "Qwen3-VL": (14.0, 42.0, 35.3, 20.4, 10.8, 21.9, 1.67),
    "Qwen3-VL-Thinking": (15.0, 43.1, 34.6, 18.5, 10.9, 18.5, 1.63),
    "Qwen3-VL+RL": (24.7, 55.8, 47.4, 22.3, 22.5, 25.8, 1.05),
    "Qwen3-VL-Thinking+RL": (23.3, 55.0, 44.4, 22.4, 21.0, 24.7, 1.12),
    "RadVLM (SFT)": (26.0, 53.3, 49.0, 30.5, 19.0, 29.1, 1.14),
    "RadVLM+RL": (29.9, 59.2, 57.0, 33.4, 25.8, 32.7, 0.86),
    "RadVLM-Thinking+RL": (30.0, 59.0, 56.3, 33.6, 25.7, 32.9, 0.87),
    "MAIRA-2": (17.7, 46.6, 52.1, None, 12.9, 21.3, 1.42),
    "CheXagent-2": (22.5, 37.4, 54.5, None, 20.1, 29.9, 1.45),
    "LLaVA-Rad": (22.2, 48.9, 53.3, None, 16.8, 28.6, 1.34),
    "DeepMedix-R1": (22.3, 52.8, 48.2, None, 18.6, 30.0, 1.23),
}

GROUNDING = ("anatomy", "abnormality", "MS-CXR", "PadChest-GR")  # mAP@0.5
TABLE_2 = {
    "MAIRA-2": (19.8, 11.3, 80.1, 38.8),
    "Qwen3-VL": (11.1, 5.1, 19.0, 10.7),
    "Qwen3-VL-Thinking": (8.7, 1.2, 14.6, 10.7),
    "Qwen3-VL+RL": (79.0, 36.0, 79.4, 55.3),
    "Qwen3-VL-Thinking+RL": (68.8, 27.6, 76.1, 42.0),
    "RadVLM (SFT)": (82.1, 44.2, 84.6, 59.0),
    "RadVLM+RL": (84.5, 45.9, 87.9, 63.0),
    "RadVLM-Thinking+RL": (84.9, 43.9, 86.4, 60.5),
}

REWARDS = ("ROUGE-L", "CheXbert micro", "RadGraph F1", "GREEN", "RadCliQ", "characters")
TABLE_3 = {
    "none (SFT)": (26.0, 49.0, 19.0, 29.1, 1.14, 207),
    "RadCliQ": (29.9, 57.0, 25.8, 32.7, 0.86, 171),
    "BERTScore": (29.0, 56.5, 23.9, 33.1, 0.93, 206),
    "RadGraph complete": (22.8, 34.1, 20.1, 23.5, 1.20, 93),
    "GLEU": (29.8, 56.0, 25.3, 33.7, 0.92, 209),
}

# Our metric under each heading. Which of RadGraph's levels theirs is we don't know; partial is the
# one usually reported.
OURS = {
    "ROUGE-L": "rouge_l",
    "BERTScore": "bertscore",
    "CheXbert micro": "chexbert_micro14",
    "CheXbert macro": "chexbert_macro14",
    "RadGraph F1": "radgraph_partial",
    "RadCliQ": "radcliq",
    "characters": "characters",
}
