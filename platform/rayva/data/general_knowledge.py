"""Short questions without pictures: a little of them keeps a language model's knowledge in stage 2.

Held-out questions test that it is still there; none of them is among the training ones.
"""

from __future__ import annotations

from collections.abc import Iterator

from rayva.data.schema import Question, Sample, Turn

_CAPITALS = {
    "Italy": "Rome", "Spain": "Madrid", "Portugal": "Lisbon", "Germany": "Berlin", "Austria": "Vienna",
    "Poland": "Warsaw", "Greece": "Athens", "Norway": "Oslo", "Sweden": "Stockholm", "Finland": "Helsinki",
    "Ireland": "Dublin", "Hungary": "Budapest", "Russia": "Moscow", "Turkey": "Ankara", "Egypt": "Cairo",
    "Kenya": "Nairobi", "China": "Beijing", "India": "New Delhi", "Thailand": "Bangkok", "Cuba": "Havana",
    "Canada": "Ottawa", "Mexico": "Mexico City", "Argentina": "Buenos Aires", "Chile": "Santiago",
    "Peru": "Lima", "Australia": "Canberra",
}  # fmt: skip
_OPPOSITES = {
    "big": "small", "old": "young", "fast": "slow", "wet": "dry", "light": "dark", "early": "late",
    "open": "closed", "full": "empty", "strong": "weak", "loud": "quiet", "deep": "shallow", "win": "lose",
    "north": "south", "inside": "outside", "always": "never",
}  # fmt: skip
_SUMS = (
    ("2 + 3", "5"), ("4 + 4", "8"), ("7 + 2", "9"), ("10 - 4", "6"), ("9 - 8", "1"), ("12 + 8", "20"),
    ("3 times 3", "9"), ("5 times 4", "20"), ("6 times 2", "12"), ("20 divided by 4", "5"),
    ("half of 16", "8"), ("twice 11", "22"),
)  # fmt: skip
_FACTS = (
    ("Which planet do we live on?", "Earth."),
    ("Which planet is known for its rings?", "Saturn."),
    ("Which planet is the closest to the Sun?", "Mercury."),
    ("What does the Moon go around?", "The Earth."),
    ("What is the largest ocean?", "The Pacific Ocean."),
    ("What is the longest river in Africa?", "The Nile."),
    ("What is the highest mountain?", "Mount Everest."),
    ("On which continent is Brazil?", "South America."),
    ("On which continent is Japan?", "Asia."),
    ("How many months does a year have?", "Twelve."),
    ("How many hours does a day have?", "24."),
    ("How many minutes are there in an hour?", "60."),
    ("How many legs does a spider have?", "Eight."),
    ("How many legs does an insect have?", "Six."),
    ("How many sides does a triangle have?", "Three."),
    ("How many letters does the English alphabet have?", "26."),
    ("How many continents are there?", "Seven."),
    ("Which month comes after June?", "July."),
    ("Which day comes before Friday?", "Thursday."),
    ("Which season comes after winter?", "Spring."),
    ("Who wrote Romeo and Juliet?", "William Shakespeare."),
    ("Who painted the Mona Lisa?", "Leonardo da Vinci."),
    ("Who proposed the theory of relativity?", "Albert Einstein."),
    ("Who was the first person to walk on the Moon?", "Neil Armstrong."),
    ("Who wrote On the Origin of Species?", "Charles Darwin."),
    ("What is the chemical formula of water?", "H2O."),
    ("What is the chemical symbol of gold?", "Au."),
    ("Which gas do plants take in from the air?", "Carbon dioxide."),
    ("Which gas do people need to breathe?", "Oxygen."),
    ("At what temperature in Celsius does water freeze?", "0 degrees."),
    ("What is frozen water called?", "Ice."),
    ("What do bees make?", "Honey."),
    ("What do cows drink when they are calves?", "Milk."),
    ("What is a baby dog called?", "A puppy."),
    ("What is a baby cat called?", "A kitten."),
    ("What is a young horse called?", "A foal."),
    ("What is the largest animal?", "The blue whale."),
    ("What is the tallest animal?", "The giraffe."),
    ("Is a whale a fish?", "No, a whale is a mammal."),
    ("Can penguins fly?", "No, but they swim very well."),
    ("What colour do red and yellow make?", "Orange."),
    ("What colour do blue and yellow make?", "Green."),
    ("What colour is a ripe lemon?", "Yellow."),
    ("What colour is snow?", "White."),
    ("What language do people speak in Brazil?", "Portuguese."),
    ("What currency does Japan use?", "The yen."),
    ("How do you say thank you in French?", "Merci."),
    ("How do you say good morning in Spanish?", "Buenos días."),
    ("What is the plural of mouse?", "Mice."),
    ("What is the past tense of go?", "Went."),
    ("What is the past tense of write?", "Wrote."),
    ("Give a word that means the same as happy.", "Glad."),
    ("Give a word that rhymes with cat.", "Hat."),
    ("Name a primary colour.", "Red."),
    ("Name a string instrument.", "The violin."),
    ("Name a sport that is played with a racket.", "Tennis."),
    ("Name three fruits.", "Apple, pear and plum."),
    ("Name two oceans.", "The Atlantic and the Indian Ocean."),
    ("What is a noun?", "A word that names a person, a place or a thing."),
    ("What is a verb?", "A word for an action or a state."),
    ("What is a library?", "A place where people can read and borrow books."),
    ("What is a volcano?", "A mountain from which molten rock, ash and gas can erupt."),
    ("What is a desert?", "A dry region where very little rain falls."),
    ("What is an island?", "Land with water all around it."),
    ("What is photosynthesis?", "The way in which plants make sugar from light, water and carbon dioxide."),
    ("What is gravity?", "The force that pulls things with mass towards each other."),
    ("What is an atom?", "The smallest piece of a chemical element."),
    ("What does a doctor do?", "A doctor treats people who are ill."),
    ("What does a thermometer measure?", "Temperature."),
    ("What is a telescope for?", "It makes far away things look nearer."),
    ("Why do people sleep?", "Sleep gives the body and the mind time to recover."),
    ("Why does ice float?", "Because it is less dense than liquid water."),
    ("Why do we have day and night?", "Because the Earth turns on its axis."),
    ("Translate to German: Good night.", "Gute Nacht."),
    ("Hello!", "Hello! How can I help you?"),
    ("Thank you.", "You are welcome!"),
)
TEXT_REPEATS = 3
"""In one epoch. Where answers follow a pattern they are sentences as the language model itself would say
them, so that what holds it near to where it was is not yet another thing to learn."""
_HELD_OUT = (
    ("capital", "What is the capital of France?", ("Paris", "The capital of France is Paris")),
    ("capital", "What is the capital of Japan?", ("Tokyo", "The capital of Japan is Tokyo")),
    ("fact", "How many days are there in a week?", ("Seven", "7", "There are seven days in a week",
                                                    "There are 7 days in a week")),
    ("fact", "Which planet is known as the red planet?", ("Mars", "Mars is known as the red planet")),
    ("opposite", "What is the opposite of hot?", ("Cold", "The opposite of hot is cold")),
    ("sum", "What is 2 + 2?", ("4", "Four", "2 + 2 = 4", "2 + 2 is 4", "2 + 2 equals 4")),
)  # fmt: skip


def text_pairs() -> list[tuple[str, str]]:
    """All training questions with their answers."""
    return [
        *(
            (f"What is the capital of {country}?", f"The capital of {country} is {city}.")
            for country, city in _CAPITALS.items()
        ),
        *(
            (f"What is the opposite of {word}?", f"The opposite of {word} is {other}.")
            for word, other in _OPPOSITES.items()
        ),
        *((f"What is {term}?", f"{term.capitalize()} is {value}.") for term, value in _SUMS),
        *_FACTS,
    ]


def text_samples() -> Iterator[Sample]:
    """The training questions, several times over, as samples without image."""
    for number, (question, answer) in enumerate(text_pairs() * TEXT_REPEATS):
        yield Sample(f"text/{number}", (), (Turn("human", question), Turn("gpt", answer)), "text")


def text_questions() -> Iterator[Question]:
    """Held-out questions without image, task "text"."""
    for number, (kind, question, accepted) in enumerate(_HELD_OUT):
        yield Question(f"text/{number}", "", "text", kind, question, accepted)
