"""Facts: capitals, small knowledge and plain words about computing, each asked in several ways."""

import random

from lessons import words
from lessons.exchange import Exchange, ask, vary

CAPITALS = dict(pair.split(":") for pair in """France:Paris Germany:Berlin Spain:Madrid Italy:Rome Austria:Vienna
Japan:Tokyo Portugal:Lisbon Greece:Athens Norway:Oslo Ireland:Dublin Egypt:Cairo Poland:Warsaw Russia:Moscow
China:Beijing
Peru:Lima Cuba:Havana Sweden:Stockholm Finland:Helsinki Denmark:Copenhagen Belgium:Brussels Hungary:Budapest
Romania:Bucharest
Bulgaria:Sofia Croatia:Zagreb Serbia:Belgrade Ukraine:Kyiv Turkey:Ankara Iran:Tehran Iraq:Baghdad India:Delhi
Nepal:Kathmandu
Thailand:Bangkok Vietnam:Hanoi Indonesia:Jakarta Australia:Canberra Canada:Ottawa Brazil:Brasilia Chile:Santiago
Colombia:Bogota
Ecuador:Quito Uruguay:Montevideo Kenya:Nairobi Ghana:Accra Nigeria:Abuja Senegal:Dakar Morocco:Rabat Tunisia:Tunis
Algeria:Algiers
Iceland:Reykjavik Estonia:Tallinn Latvia:Riga Lithuania:Vilnius Slovakia:Bratislava Slovenia:Ljubljana Switzerland:Bern
Netherlands:Amsterdam Lebanon:Beirut Jordan:Amman Mongolia:Ulaanbaatar Uganda:Kampala Ethiopia:Addis_Ababa
Argentina:Buenos_Aires Malaysia:Kuala_Lumpur Philippines:Manila England:London""".replace("_", "~").split())
CAPITALS = {country: capital.replace("~", " ") for country, capital in CAPITALS.items()}
CAPITALS["the United States"] = "Washington"
CAPITALS["South Korea"] = "Seoul"

CAPITAL_OF = ("What is the capital of {c}?", "Which city is the capital of {c}?", "What's the capital city of {c}?",
              "Name the capital of {c}.", "Capital of {c}?", "Tell me the capital of {c}.",
              "Do you know the capital of {c}?", "I want to know the capital of {c}.", "What is {c}'s capital?")
COUNTRY_OF = ("{k} is the capital of which country?", "Which country has {k} as its capital?",
              "Of which country is {k} the capital?", "What country is {k} the capital of?")


def capital(rng: random.Random) -> Exchange:
    country = rng.choice(list(CAPITALS))
    city = CAPITALS[country]
    if rng.random() < 0.72:
        answer, brief = f"The capital of {country} is {city}.", city
        question = rng.choice(CAPITAL_OF).format(c=country)
    else:
        answer, brief = f"{city} is the capital of {country}.", country
        question = rng.choice(COUNTRY_OF).format(k=city)
    return ask("capitals", vary(rng, question), answer, brief=brief)


OPPOSITES = dict(pair.split(":") for pair in ["hot:cold", "big:small", "tall:short", "fast:slow", "happy:sad",
                                              "light:dark", "old:young", "good:bad", "rich:poor", "early:late",
                                              "full:empty", "hard:soft", "high:low", "loud:quiet", "strong:weak",
                                              "wet:dry", "open:closed", "up:down", "left:right", "day:night",
                                              "black:white", "first:last", "clean:dirty", "near:far", "thick:thin",
                                              "easy:difficult", "true:false", "yes:no", "win:lose", "love:hate"])
SOUNDS = dict(pair.split(":") for pair in ["dog:barks", "cat:meows", "cow:moos", "duck:quacks", "lion:roars",
                                           "sheep:bleats", "horse:neighs", "pig:oinks", "frog:croaks", "owl:hoots",
                                           "bee:buzzes", "wolf:howls", "mouse:squeaks", "snake:hisses"])
YOUNG = dict(pair.split(":") for pair in ["dog:puppy", "cat:kitten", "cow:calf", "duck:duckling", "lion:cub",
                                          "sheep:lamb", "horse:foal", "pig:piglet", "goat:kid", "hen:chick",
                                          "frog:tadpole", "deer:fawn"])
COLOR_OF = {"the sky": "blue", "grass": "green", "snow": "white", "blood": "red", "a banana": "yellow",
            "a lemon": "yellow", "coal": "black", "milk": "white", "a tomato": "red", "chocolate": "brown",
            "an elephant": "gray", "a carrot": "orange", "a flamingo": "pink", "the sun": "yellow", "a frog": "green"}
LEGS = {"dog": 4, "cat": 4, "bird": 2, "spider": 8, "ant": 6, "bee": 6, "horse": 4, "hen": 2, "snake": 0, "crab": 10,
        "human": 2, "elephant": 4, "fish": 0}
SPOKEN = {"France": "French", "Germany": "German", "Spain": "Spanish", "Italy": "Italian", "Japan": "Japanese",
          "China": "Chinese", "Russia": "Russian", "Brazil": "Portuguese", "Mexico": "Spanish", "Egypt": "Arabic",
          "Greece": "Greek", "Poland": "Polish", "Sweden": "Swedish", "Turkey": "Turkish", "Austria": "German",
          "Portugal": "Portuguese", "Argentina": "Spanish", "England": "English", "Australia": "English"}
CONTINENT = {"Europe": "France Germany Spain Italy Poland Greece Norway Sweden Portugal Austria",
             "Asia": "Japan China India Thailand Vietnam Nepal Mongolia Iran Indonesia",
             "Africa": "Egypt Kenya Ghana Nigeria Morocco Senegal Tunisia Uganda",
             "South America": "Peru Brazil Chile Colombia Argentina Uruguay Ecuador",
             "North America": "Canada Mexico Cuba"}
SYMBOL = {"gold": "Au", "silver": "Ag", "iron": "Fe", "oxygen": "O", "hydrogen": "H", "carbon": "C", "water": "H2O",
          "helium": "He", "salt": "NaCl", "copper": "Cu"}

# question forms, answer, brief answer
SINGLE: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (("How many days are in a week?", "How many days does a week have?"), "A week has 7 days.", "7"),
    (("How many months are in a year?", "How many months does a year have?"), "A year has 12 months.", "12"),
    (("How many days are in a year?", "How many days does a year have?"), "A year has 365 days.", "365"),
    (("How many hours are in a day?", "How many hours does a day have?"), "A day has 24 hours.", "24"),
    (("How many minutes are in an hour?", "How many minutes does an hour have?"), "An hour has 60 minutes.", "60"),
    (("How many seconds are in a minute?", "How many seconds does a minute have?"), "A minute has 60 seconds.", "60"),
    (("How many centimeters are in a meter?", "How many centimeters does a meter have?"),
     "A meter has 100 centimeters.", "100"),
    (("How many letters are in the alphabet?", "How many letters does the English alphabet have?"),
     "The English alphabet has 26 letters.", "26"),
    (("What is the largest ocean?", "Which ocean is the largest?"), "The largest ocean is the Pacific.", "Pacific"),
    (("What is the highest mountain?", "Which mountain is the highest?", "What is the tallest mountain?"),
     "The highest mountain is Mount Everest.", "Mount Everest"),
    (("What is the longest river?", "Which river is the longest?"), "The longest river is the Nile.", "Nile"),
    (("What is the largest planet?", "Which planet is the largest?"), "The largest planet is Jupiter.", "Jupiter"),
    (("Which planet is closest to the sun?", "What planet is nearest to the sun?"),
     "Mercury is closest to the sun.", "Mercury"),
    (("Which planet is called the red planet?", "What is the red planet?"), "The red planet is Mars.", "Mars"),
    (("What planet do we live on?", "On which planet do we live?"), "We live on the planet Earth.", "Earth"),
    (("Who wrote Romeo and Juliet?", "Who is the author of Romeo and Juliet?"),
     "William Shakespeare wrote Romeo and Juliet.", "William Shakespeare"),
    (("Who wrote Hamlet?", "Who is the author of Hamlet?"), "William Shakespeare wrote Hamlet.", "William Shakespeare"),
    (("Who painted the Mona Lisa?", "Which artist painted the Mona Lisa?"), "Leonardo da Vinci painted the Mona Lisa.",
     "Leonardo da Vinci"),
    (("Who was the first man on the moon?", "Who walked on the moon first?"),
     "Neil Armstrong was the first man on the moon.", "Neil Armstrong"),
    (("Who discovered gravity?", "Who described gravity?"), "Isaac Newton described gravity.", "Isaac Newton"),
    (("Who developed the theory of relativity?", "Who found the theory of relativity?"),
     "Albert Einstein developed the theory of relativity.", "Albert Einstein"),
    (("At what temperature does water boil?", "What is the boiling point of water?"),
     "Water boils at 100 degrees Celsius.", "100 degrees Celsius"),
    (("At what temperature does water freeze?", "What is the freezing point of water?"),
     "Water freezes at 0 degrees Celsius.", "0 degrees Celsius"),
    (("What do bees make?", "What is made by bees?"), "Bees make honey.", "Honey"),
    (("What do plants need to grow?", "What does a plant need?"), "Plants need water, light and air.",
     "Water, light and air"),
    (("What do we breathe?", "What do people breathe?"), "We breathe air.", "Air"),
    (("What is the fastest land animal?", "Which land animal is the fastest?"),
     "The fastest land animal is the cheetah.", "Cheetah"),
    (("What is the largest animal?", "Which animal is the largest?"), "The largest animal is the blue whale.",
     "Blue whale"),
    (("What is the tallest animal?", "Which animal is the tallest?"), "The tallest animal is the giraffe.", "Giraffe"),
    (("How many sides does a triangle have?", "How many sides are in a triangle?"), "A triangle has 3 sides.", "3"),
    (("How many sides does a square have?", "How many sides are in a square?"), "A square has 4 sides.", "4"),
    (("What is frozen water called?", "What do we call frozen water?"), "Frozen water is called ice.", "Ice"),
    (("What is the opposite of north?", "Which direction is opposite to north?"), "The opposite of north is south.",
     "South"),
    (("Where does the sun rise?", "In which direction does the sun rise?"), "The sun rises in the east.", "East"),
    (("Where does the sun set?", "In which direction does the sun set?"), "The sun sets in the west.", "West"),
    (("Which season comes after winter?", "What season follows winter?"), "Spring comes after winter.", "Spring"),
    (("Which season comes after summer?", "What season follows summer?"), "Autumn comes after summer.", "Autumn"),
    (("What is the meaning of life?", "What is the answer to everything?"), "Some say that it is 42.", "42"),
)


def small_fact(rng: random.Random) -> tuple[str, str, str]:
    """(question, answer, brief answer)."""
    kind = rng.randrange(12)
    if kind == 0:
        word, other = rng.choice(list(OPPOSITES.items()))
        if rng.random() < 0.4:
            word, other = other, word
        forms: tuple[str, ...] = ("What is the opposite of {w}?",
                                  "Name the opposite of {w}.", "Which word is the opposite of {w}?")
        return rng.choice(forms).format(w=word), f"The opposite of {word} is {other}.", other
    if kind == 1:
        animal, sound = rng.choice(list(SOUNDS.items()))
        forms = ("What sound does {a} make?", "What does {a} do to make a sound?", "Which sound does {a} make?")
        return rng.choice(forms).format(a=words.a(animal)), f"{words.a(animal).capitalize()} {sound}.", sound
    if kind == 2:
        animal, young = rng.choice(list(YOUNG.items()))
        forms = ("What is a young {a} called?", "What is a baby {a} called?", "What do we call a young {a}?")
        return rng.choice(forms).format(a=animal), f"A young {animal} is called a {young}.", young
    if kind == 3:
        thing, color = rng.choice(list(COLOR_OF.items()))
        forms = ("What color is {t}?", "Which color does {t} have?", "What is the color of {t}?")
        return rng.choice(forms).format(t=thing), f"{thing[0].upper()}{thing[1:]} is {color}.", color
    if kind == 4:
        animal, legs = rng.choice(list(LEGS.items()))
        forms = ("How many legs does {a} have?", "How many legs has {a}?")
        article = words.a(animal)
        return rng.choice(forms).format(a=article), f"{article.capitalize()} has {legs} legs.", str(legs)
    if kind == 5:
        country, tongue = rng.choice(list(SPOKEN.items()))
        forms = ("Which language do people speak in {c}?", "What language is spoken in {c}?",
                 "What do people in {c} speak?")
        return rng.choice(forms).format(c=country), f"People in {country} speak {tongue}.", tongue
    if kind == 6:
        continent, countries = rng.choice(list(CONTINENT.items()))
        country = rng.choice(countries.split())
        forms = ("On which continent is {c}?", "Which continent is {c} on?", "Where is {c}?")
        return rng.choice(forms).format(c=country), f"{country} is in {continent}.", continent
    if kind == 7:
        stuff, symbol = rng.choice(list(SYMBOL.items()))
        forms = ("What is the chemical symbol of {s}?", "What is the formula of {s}?",
                 "Give me the chemical symbol for {s}.")
        return rng.choice(forms).format(s=stuff), f"The chemical symbol of {stuff} is {symbol}.", symbol
    if kind == 8:
        series, unit = rng.choice(((words.DAYS, "day"), (words.MONTHS, "month")))
        at, step = rng.randrange(len(series)), rng.choice((1, -1))
        where = "after" if step == 1 else "before"
        found = series[(at + step) % len(series)]
        forms = ("What {u} comes {w} {d}?", "Which {u} is {w} {d}?", "What is the {u} {w} {d}?")
        return rng.choice(forms).format(u=unit, w=where, d=series[at]), f"{found} comes {where} {series[at]}.", found
    forms, answer, brief = rng.choice(SINGLE)
    return rng.choice(forms), answer, brief


def fact(rng: random.Random) -> Exchange:
    question, answer, brief = small_fact(rng)
    return ask("facts", vary(rng, question), answer, brief=brief)


COMPUTING = {
    "deep learning": "Deep learning is a kind of machine learning that uses neural networks with many layers.",
    "machine learning": "Machine learning lets a computer learn from examples instead of fixed rules.",
    "a neural network": "A neural network is a model made of layers of simple units that learn from data.",
    "a tokenizer": "A tokenizer cuts a text into small pieces called tokens.",
    "a token": "A token is a small piece of text, such as a word or a part of a word.",
    "a GPU": "A GPU is a chip that does many small calculations at the same time.",
    "a CPU": "A CPU is the main chip of a computer and runs its programs.",
    "a language model": "A language model is a program that predicts the next token of a text.",
    "a transformer": "A transformer is a neural network that uses attention to read a text.",
    "attention": "Attention lets a model look at the important parts of a text.",
    "artificial intelligence": "Artificial intelligence makes computers do things that need thinking.",
    "a computer": "A computer is a machine that follows instructions to work with data.",
    "a program": "A program is a list of instructions for a computer.",
    "an algorithm": "An algorithm is a clear list of steps that solves a problem.",
    "the internet": "The internet is a network that connects computers all over the world.",
    "a server": "A server is a computer that answers requests from other computers.",
    "a database": "A database stores data so that it can be found again quickly.",
    "Python": "Python is a programming language that is easy to read.",
    "Rust": "Rust is a programming language made for safe and fast programs.",
    "JSON": "JSON is a simple text format for data with keys and values.",
    "an API": "An API is a way for one program to talk to another program.",
    "training": "Training is the work of changing a model so that it fits its examples.",
    "inference": "Inference is using a trained model to get an answer.",
    "a dataset": "A dataset is a collection of examples.",
    "quantization": "Quantization stores the numbers of a model with fewer bits.",
    "an embedding": "An embedding is a list of numbers that stands for a word or a text.",
    "overfitting": "Overfitting means that a model learns its examples by heart and fails on new ones.",
    "reinforcement learning": "Reinforcement learning teaches a model with rewards for good actions.",
    "open source": "Open source means that everyone can read and use the code of a program.",
    "text generation": "Text generation is writing a text with a model, one token after the other.",
}
COMPUTING_FORMS = ("What is {t}?", "Explain {t}.", "Define {t}.", "Tell me about {t}.", "Can you explain {t}?",
                   "What is {t} in simple words?", "What does {t} mean?", "What's {t}?", "Please explain {t} to me.",
                   "I want to understand {t}.")


def topic_forms(rng: random.Random, topic: str) -> str:
    """The topic as people write it: with or without its article, in title case, as it is."""
    style = rng.random()
    if style < 0.55:
        return topic
    bare = topic.removeprefix("a ").removeprefix("an ").removeprefix("the ")
    if style < 0.65:
        return bare
    title = " ".join(word if word.isupper() else word.capitalize() for word in bare.split())
    return title if style < 0.9 else topic[: len(topic) - len(bare)] + title


def computing(rng: random.Random) -> Exchange:
    topic = rng.choice(list(COMPUTING))
    question = rng.choice(COMPUTING_FORMS).format(t=topic_forms(rng, topic))
    return ask("facts", vary(rng, question), COMPUTING[topic])


def knowledge(rng: random.Random) -> Exchange:
    """Any fact that is not a capital."""
    return computing(rng) if rng.random() < 0.3 else fact(rng)
