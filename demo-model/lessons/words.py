"""Words: the names, places and things that the lessons are filled with."""

import random

NAMES = ["Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Ivy", "Jack", "Kate", "Leo", "Mia",
         "Noah", "Olivia", "Paul", "Quinn", "Rosa", "Sam", "Tom", "Uma", "Victor", "Wendy", "Alex", "Bella", "Carlos",
         "Diana", "Eric", "Fiona", "George", "Hanna", "Ivan", "Julia", "Kevin", "Lucy", "Max", "Nina", "Oscar",
         "Peter", "Ruth", "Sara", "Theo", "Vera", "Will", "Zoe", "Alice", "Bob", "Charlie", "Daniel", "Eva", "Frank",
         "Gina", "Hugo", "Ida", "John", "Karen", "Laura", "Maria", "Nick", "Otto", "Pia", "Robert", "Sofia", "Tim"]
ANIMALS = ["fox", "bear", "rabbit", "cat", "dog", "mouse", "owl", "lion", "tiger", "wolf", "duck", "frog", "horse",
           "elephant", "monkey", "turtle", "penguin", "squirrel", "hedgehog", "deer", "goat", "sheep", "pig", "cow",
           "hen", "crow", "whale", "dolphin", "crab", "bee"]
JOBS = ["baker", "teacher", "doctor", "nurse", "farmer", "painter", "writer", "singer", "cook", "driver", "pilot",
        "lawyer", "gardener", "builder", "dentist", "plumber", "waiter", "tailor", "judge", "engineer"]
HOBBIES = ["chess", "music", "football", "swimming", "cooking", "reading", "dancing", "hiking", "painting", "tennis",
           "cycling", "fishing", "singing", "gardening", "running", "yoga", "skiing", "photography"]
COLORS = ["red", "blue", "green", "yellow", "black", "white", "brown", "pink", "orange", "purple", "gray"]
PETS = ["dog", "cat", "rabbit", "hamster", "parrot", "horse", "turtle", "goldfish", "snake", "pony"]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
MONTHS = ["January", "February", "March", "April", "May", "June", "July", "August", "September", "October",
          "November", "December"]
CITIES = ["London", "Paris", "Berlin", "Madrid", "Rome", "Vienna", "Tokyo", "Lisbon", "Athens", "Oslo", "Dublin",
          "Cairo", "Boston", "Chicago", "Munich", "Milan", "Hamburg", "Sydney", "Toronto", "Denver", "Seattle",
          "Mumbai", "Delhi", "Lyon", "Geneva", "Zurich", "Naples", "Porto", "Dallas", "Houston", "Miami", "Austin",
          "Kyoto", "Osaka", "Bergen", "Venice", "Florence", "Valencia", "Prague", "Warsaw", "Moscow", "Beijing",
          "Lima", "Havana"]
THINGS = ["lamp", "table", "chair", "phone", "book", "bike", "camera", "watch", "bottle", "guitar", "radio", "bag",
          "jacket", "knife", "mirror", "kettle", "pillow", "clock", "ladder", "shovel", "hat", "kite", "ball", "drum",
          "cup"]
NOUNS = ["apple", "river", "stone", "cloud", "door", "garden", "window", "bread", "train", "mountain", "letter",
         "song", "flower", "star", "ship", "bridge", "tree", "house", "moon", "sun", "rain", "snow", "wind", "fire",
         "road", "field", "lake", "island", "forest", "city", "village", "school", "king", "queen", "child", "friend",
         "teacher", "cake", "soup", "milk", "honey", "sugar", "salt", "water", "coffee", "tea", "butter", "cheese",
         "egg", "fish", "bird", "key", "ring", "box", "pen", "paper", "paint", "wall", "roof", "floor"]
ADJECTIVES = ["small", "big", "old", "young", "happy", "quiet", "brave", "clever", "kind", "warm", "cold", "bright",
              "dark", "soft", "loud", "slow", "fast", "new", "long", "short", "sweet", "strange", "gentle", "hungry",
              "proud", "tall", "tiny", "round"]
VERBS = ["sings", "sleeps", "jumps", "runs", "swims", "waits", "smiles", "dances", "works", "reads", "laughs", "walks"]
LANGUAGES = ["French", "German", "Spanish", "Italian", "Greek", "Polish", "Dutch", "Swedish", "Japanese", "Russian",
             "Portuguese", "Turkish"]
TOPICS = ["sports", "politics", "science", "music", "health", "cars", "travel", "food", "space", "football", "art",
          "history", "climate", "business", "movies", "games", "fashion", "education", "weather", "technology"]

_ONSETS = ["b", "c", "d", "f", "g", "h", "j", "k", "l", "m", "n", "p", "r", "s", "t", "v", "w", "z", "br", "dr", "gr",
           "kl", "pl", "st", "tr", "sh", "ch", "th", "fl", "sn"]
_VOWELS = ["a", "e", "i", "o", "u", "a", "e", "i", "o", "u", "ai", "ea", "ee", "oo", "ou"]
_CODAS = ["", "", "", "n", "r", "l", "s", "t", "m", "nd", "rk", "x", "p", "ck"]


def made_up(rng: random.Random) -> str:
    """A pronounceable word that means nothing, so that copying cannot lean on known words."""
    return "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS) for _ in range(rng.randint(1, 3)))


def name(rng: random.Random) -> str:
    return rng.choice(NAMES) if rng.random() < 0.75 else made_up(rng).capitalize()


def city(rng: random.Random) -> str:
    if rng.random() < 0.12:
        return made_up(rng).capitalize()
    return rng.choice(CITIES)


def phrase(rng: random.Random, low: int = 2, high: int = 6) -> str:
    """A few words in a row, sometimes a real small sentence."""
    kind = rng.random()
    if kind < 0.4:
        text = f"the {rng.choice(ADJECTIVES)} {rng.choice(NOUNS + ANIMALS)} {rng.choice(VERBS)}"
        return text + (f" near the {rng.choice(NOUNS)}" if rng.random() < 0.5 else "")
    pool = NOUNS + ADJECTIVES + ANIMALS + THINGS + COLORS + JOBS + HOBBIES + VERBS
    words = [made_up(rng) if rng.random() < 0.15 else rng.choice(pool) for _ in range(rng.randint(low, high))]
    return " ".join(words)


def listing(items: list[str]) -> str:
    """'a, b and c'."""
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]


def a(noun: str) -> str:
    return f"an {noun}" if noun[0].lower() in "aeiou" else f"a {noun}"
