"""Short facts that most models know."""

from __future__ import annotations

import random

from pm_llm.tasks.base import Example
from pm_llm.tasks.general import asked

FACTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("What is the capital of France?", ("Paris",)),
    ("What is the capital of Japan?", ("Tokyo",)),
    ("What is the capital of Egypt?", ("Cairo",)),
    ("What is the capital of Canada?", ("Ottawa",)),
    ("What is the capital of Norway?", ("Oslo",)),
    ("Which planet is closest to the sun?", ("Mercury",)),
    ("Which planet is the largest of the solar system?", ("Jupiter",)),
    ("How many days has a leap year?", ("366",)),
    ("How many legs has a spider?", ("8", "eight")),
    ("How many continents are there?", ("7", "seven")),
    ("Which gas do plants take in from the air?", ("carbon dioxide", "CO2")),
    ("What is the chemical symbol of gold?", ("Au",)),
    ("What is the chemical formula of water?", ("H2O",)),
    ("At how many degrees Celsius does water boil at sea level?", ("100", "one hundred")),
    ("Who wrote Romeo and Juliet?", ("Shakespeare",)),
    ("Who painted the Mona Lisa?", ("Leonardo", "Da Vinci")),
    ("Which ocean lies between Europe and America?", ("Atlantic",)),
    ("Which is the longest river of Africa?", ("Nile",)),
    ("Which is the highest mountain on Earth?", ("Everest",)),
    ("In which country is the Taj Mahal?", ("India",)),
    ("In which city is the Colosseum?", ("Rome",)),
    ("Which language is spoken in Brazil?", ("Portuguese",)),
    ("What is the currency of Japan?", ("yen",)),
    ("In which year did the Second World War end?", ("1945",)),
    ("In which year did people first walk on the moon?", ("1969",)),
    ("Who was the first president of the United States?", ("Washington",)),
    ("Which animal gives us wool?", ("sheep",)),
    ("What do bees make?", ("honey",)),
    ("Which metal is liquid at room temperature?", ("mercury",)),
    ("How many sides has a hexagon?", ("6", "six")),
    ("How many minutes are there in two hours?", ("120", "one hundred and twenty")),
    ("Which is the smallest prime number?", ("2", "two")),
    ("Which organ pumps the blood through the body?", ("heart",)),
    ("Which is the largest land animal?", ("elephant", "elephants")),
    ("Who developed the theory of relativity?", ("Einstein",)),
    ("Which force makes things fall to the ground?", ("gravity", "gravitational", "gravitation")),
    ("Which colour do blue and yellow paint give when mixed?", ("green",)),
    ("How many strings has a violin?", ("4", "four")),
    ("On which continent is the Sahara?", ("Africa",)),
    ("Which country is shaped like a boot?", ("Italy",)),
)
ROWS, NEW_TOKENS, SCORER = len(FACTS), 32, "verified"


def make(rng: random.Random, number: int) -> Example:
    """A question and its answers, of which one must be said."""
    question, answers = FACTS[number]
    return asked(f"{question} Answer in a few words.", checks=[["equals", list(answers)]])
