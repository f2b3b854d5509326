"""A reward of verl: one answer at a time, by its data source."""


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: object = None) -> float:
    """1 for the right digit in its tags, 0.2 for the tags alone."""
    text = solution_str.strip()
    tagged = text.startswith("<answer>") and text.endswith("</answer>")
    right = tagged and text.removeprefix("<answer>").removesuffix("</answer>").strip() == ground_truth
    return 1.0 if right else 0.2 if tagged else 0.0
