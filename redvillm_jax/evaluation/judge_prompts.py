"""The judge's prompts. They ask for the same things as Video-ChatGPT's scripts, in this project's words.

The scripts' example reply, {''score': 4.8}, is neither valid Python nor an integer, though they demand both; the
example here is valid. Source: quantitative_evaluation/ in https://github.com/mbzuai-oryx/Video-ChatGPT.
"""

import hashlib
import json
from collections.abc import Mapping

PROMPTS_VERSION = "1"

_PAIR = """\
Question: {question}
Correct answer: {answer}
Predicted answer: {prediction}"""
_TWO = """\
First question: {question}
Second question: {question_2}
Correct answer to both: {answer}
Predicted answer to the first question: {prediction}
Predicted answer to the second question: {prediction_2}"""

_SYSTEM = """\
You grade what a model answered to a question about a video, for {aspect}. You see the question, the correct answer \
and the predicted answer, not the video. Decide {criterion}

Rules:
{rules}"""

# By aspect: its name, the criterion, and the rules of grading.
_ASPECTS = {
    "correctness": (
        "factual accuracy",
        "whether the prediction agrees in its facts with the correct answer.",
        (
            "Look at facts: a wrong reading of the video or information that is not so lowers the score.",
            "What is said has to be true and has to fit the content of the video.",
            "The same in other words, or by synonyms, counts as the same.",
            "Measure the factual accuracy of the prediction against the correct answer.",
        ),
    ),
    "detail": (
        "attention to detail",
        "how detailed the prediction is: both how complete and how specific.",
        (
            "Complete means that it has all the main points of the video and leaves no important side of it out.",
            "Specific means that it names particular things seen in the video instead of what could be said of any.",
            "The same in other words, or by synonyms, counts as the same.",
            "Give one score in which completeness and specificity are both expressed.",
        ),
    ),
    "context": (
        "understanding of the context",
        "whether the prediction fits the context of the video as a whole.",
        (
            "Nothing that it says may be out of the video's context or be at odds with it.",
            "It has to have understood what the video is mainly about, and its mood.",
            "The same in other words, or by synonyms, counts as the same.",
            "Measure the understanding of the context against the correct answer.",
        ),
    ),
    "temporal": (
        "understanding of time",
        "whether the prediction has the events of the video in the order in which they happen.",
        (
            "Look at the order: events and details have to come one after the other as they do in the video and in the "
            "correct answer.",
            "Other words and synonyms count as the same only where the order stays the same.",
            "Measure the temporal accuracy of the prediction against the correct answer.",
        ),
    ),
    "consistency": (
        "consistency between answers to similar questions",
        "whether the two predictions are consistent. There are two questions here that are much alike, one correct "
        "answer to both, and a prediction for each.",
        (
            "Both predictions have to agree with the correct answer and with each other, without a contradiction or a "
            "marked difference.",
            "What they tell about the video has to be the same.",
            "Other words and synonyms count as the same only where no information is lost by them.",
            "Measure the consistency of both predictions against the correct answer.",
        ),
    ),
    "qa": (
        "correctness",
        "whether the predicted and the correct answer match in meaning.",
        (
            "What counts is a match in meaning between prediction and correct answer.",
            "The same in other words, or by synonyms, is a match.",
            "Measure the correctness of the prediction against the correct answer.",
        ),
    ),
}

_SCORE = """\
Grade this:

{texts}

Give only the score for {aspect}: a whole number from 0 to 5, where 5 is best. Reply with nothing but a Python \
dictionary with the key 'score', its value a number and not text. For example: {{'score': 4}}"""
_YES_NO = """\
Grade this:

{texts}

Say yes or no, and give a score: a whole number from 0 to 5, where 5 is the best match in meaning. Reply with nothing \
but a Python dictionary with the keys 'pred', which is 'yes' or 'no', and 'score', its value a number and not text. \
For example: {{'pred': 'yes', 'score': 4}}"""
_AGAIN = "\n\nReply number {attempt} to this could not be read. Reply with that dictionary alone."


def templates(aspect: str) -> tuple[str, str]:
    """The system and user message of "qa" or an aspect of VCGBench; the user message has names in braces."""
    graded, criterion, rules = _ASPECTS[aspect]
    system = _SYSTEM.format(aspect=graded, criterion=criterion, rules="\n".join(f"- {rule}" for rule in rules))
    texts = _TWO if aspect == "consistency" else _PAIR
    # The names and the example's braces in the user message stay for the second formatting.
    user = (_YES_NO if aspect == "qa" else _SCORE).replace("{texts}", texts).replace("{aspect}", graded)
    return system, user


def messages(aspect: str, texts: Mapping[str, str], attempt: int) -> list[dict[str, str]]:
    """The messages of attempt 1, 2, …; each differs from the messages before, whose replies could not be read."""
    system, user = templates(aspect)
    content = user.format(**texts) + (_AGAIN.format(attempt=attempt - 1) if attempt > 1 else "")
    return [{"role": "system", "content": system}, {"role": "user", "content": content}]


def prompt_hash(aspect: str) -> str:
    """The first 12 hexadecimal digits of the SHA-256 of an aspect's prompts."""
    return hashlib.sha256(json.dumps([*templates(aspect), _AGAIN]).encode()).hexdigest()[:12]
