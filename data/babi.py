"""
The bAbI tasks 1 to 10 (Weston et al. 2015, arXiv 1502.05698): an endless source of stories, and a
reader of the original files.

    simulate     a story of a task
    read_babi    the stories of a real bAbI v1.2 file

    python -m data.babi --task=qa3 --seed=1     prints a story
"""
import argparse
import random
from typing import NamedTuple

from data.files import read_utf8


class Line(NamedTuple):
    text: str            # "Mary moved to the bathroom." or "Where is Mary?"
    answer: str = ""     # of a question ("bathroom", "milk,football", "yes"); "" for a fact
    support: tuple = ()  # of a question: indices in the story of the facts that support the answer


# --- The simulator. How likely an event is, and what is asked when, was counted in the originals.

ACTORS = ("John", "Mary", "Sandra", "Daniel")  # gifts prefer the first
PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
OBJECTS = ("apple", "football", "milk")
NUMBERS = ("none", "one", "two", "three")
OPPOSITE = {"north": "south", "south": "north", "east": "west", "west": "east"}
VERBS = {
    "move": ("went to", "went back to", "moved to", "journeyed to", "travelled to"),
    "get": ("took", "got", "grabbed", "picked up"),
    "drop": ("dropped", "left", "discarded", "put down"),
    "give": ("gave", "handed", "passed"),
    "is": ("is in",),
    "not": ("is not in", "is no longer in"),
    "either": ("is either in",),
}
HANDLING = ("get", "drop", "give")  # what is done with objects; the others tell where an actor is


class Fact(NamedTuple):
    line: int      # its index in the story
    kind: str      # move, get, drop, give; tasks 9 and 10 also tell of moves by is, not, either
    actor: str
    thing: object  # the object, of a move the place, of "either" two places
    to: str        # who is given the object
    told: object   # the fact before this one that tells where the actor is, or None


class World:
    """The story so far: what was told, and how things really stand."""

    def __init__(self, rng, kinds, actors=ACTORS, places=PLACES, get_there=1.0):
        """
        kinds: of events, one drawn as often as another
        get_there: how often an object is taken "there"
        """
        self.rng, self.kinds, self.actors, self.places = rng, kinds, actors, places
        self.there = {"get": get_there, "drop": 0.2, "give": 0}
        self.place = {actor: rng.choice(places) for actor in actors}
        self.where = {thing: rng.choice(places) for thing in OBJECTS}  # a place, or its holder
        self.lines, self.facts = [], []
        self.told = {}     # actor -> the last fact on where the actor is
        self.handled = {}  # object -> the last fact on who took, dropped or gave it
        self.walks = {thing: [] for thing in OBJECTS}  # object -> its holder's moves since taken

    def held_by(self, actor):
        return [thing for thing in OBJECTS if self.where[thing] == actor]

    def ask(self, text, answer, support):
        self.lines.append(Line(text, answer, tuple(fact.line for fact in support)))

    def event(self):
        """
        One more event. What cannot be (to take what is not there, to go where one is) is drawn
        again, which settles how often each kind happens. A gift alone is looked for: the first in
        order of objects and actors that can be made, if any.
        """
        happened = False
        while not happened:
            kind, actor = self.rng.choice(self.kinds), self.rng.choice(self.actors)
            if kind == "give":
                happened = self.give()
            elif kind in HANDLING:
                happened = self.get_or_drop(kind, actor)
            else:
                happened = self.go(kind, actor)

    def tell(self, kind, actor, thing, to, text):
        self.facts.append(Fact(len(self.lines), kind, actor, thing, to, self.told.get(actor)))
        self.lines.append(Line(text))
        return self.facts[-1]

    def go(self, kind, actor):
        """The actor goes to another place, and one of four ways to tell about it."""
        before, place = self.place[actor], self.rng.choice(self.places)
        if place == before:
            return False
        self.place[actor] = place
        thing = before if kind == "not" else place
        if kind == "either":  # the same place twice now and then, as in the original
            thing = self.rng.sample([place, self.rng.choice(self.places)], 2)
        words = " or the ".join(thing) if kind == "either" else thing
        text = f"{actor} {self.rng.choice(VERBS[kind])} the {words}."
        fact = self.told[actor] = self.tell(kind, actor, thing, "", text)
        for held in self.held_by(actor):
            self.walks[held].append(fact)
        return True

    def get_or_drop(self, kind, actor):
        things = self.held_by(self.place[actor] if kind == "get" else actor)
        if not things:
            return False
        thing = self.rng.choice(things)
        self.handle(kind, actor, thing)
        self.where[thing] = actor if kind == "get" else self.place[actor]
        if kind == "get":
            self.walks[thing] = []
        return True

    def give(self):
        for thing, giver in self.where.items():
            for to in self.actors if giver in self.place else ():
                if to != giver and self.place[to] == self.place[giver]:
                    self.handle("give", giver, thing, to)
                    self.where[thing] = to
                    return True
        return False

    def handle(self, kind, actor, thing, to=""):
        there = " there" if not to and self.rng.random() < self.there[kind] else ""
        ending = f" to {to}" if to else there
        text = f"{actor} {self.rng.choice(VERBS[kind])} the {thing}{ending}."
        self.handled[thing] = self.tell(kind, actor, thing, to, text)


def tell_and_ask(world, question):
    """
    A story: five times two events and a question(world, fact) -> (text, answer, support) about one
    of the last five facts; where they give nothing to ask (None), two events more.
    """
    for _ in range(5):
        found = None
        while not found:
            world.event()
            world.event()
            recent = world.facts[-5:]
            world.rng.shuffle(recent)
            found = next(filter(None, (question(world, fact) for fact in recent)), None)
        text, answer, support = found
        world.ask(text, answer, support)
    return world.lines


def tell_then_ask(world, questions):
    """
    A story for training: two to ten events (where they give nothing to ask, as many again), and
    behind them, in any order, all that can be asked about them.
    """
    found = {}
    while not found:
        for _ in range(world.rng.randint(2, 10)):
            world.event()
        asked = [question(world, fact) for question in questions for fact in world.facts]
        found = {question_text: (question_text, answer, support)
                 for question_text, answer, support in filter(None, asked)}
    for text, answer, support in world.rng.sample(list(found.values()), len(found)):
        world.ask(text, answer, support)
    return world.lines


def where_is_actor(world, fact):
    """Of an actor whose place was told, and not what it is not or might be (tasks 9 and 10)."""
    told = world.told.get(fact.actor)
    if not told or told.kind not in ("move", "is"):
        return None
    return f"Where is {fact.actor}?", told.thing, [told]


def where_is_object(world, fact):
    """Of an object that was dropped, or carried somewhere."""
    if fact.kind not in HANDLING:
        return None
    last, walk = world.handled[fact.thing], world.walks[fact.thing]
    carried = walk[-1] if walk else None
    move = last.told if last.kind == "drop" else carried
    return (f"Where is the {fact.thing}?", move.thing, [last, move]) if move else None


def where_was_object(world, fact):
    """Of an object carried to two places or more. It must not have come back to the second."""
    if fact.kind not in HANDLING:
        return None
    walk = world.walks[fact.thing]
    pairs = [(before, after) for i, (before, after) in enumerate(zip(walk, walk[1:]))
             if after.thing not in [move.thing for move in walk[i + 2:]]]
    if not pairs:
        return None
    before, after = world.rng.choice(pairs)
    text = f"Where was the {fact.thing} before the {after.thing}?"
    return text, before.thing, [world.handled[fact.thing], after, before]


def who_gave_what(world, fact):
    """Of a gift, unless the object, or another between the same two, was given since."""
    giver, thing, to = fact.actor, fact.thing, fact.to
    later = [other for other in world.facts if other.kind == "give" and other.line > fact.line]
    again = [other for other in later
             if other.thing == thing or (other.actor, other.to) == (giver, to)]
    if fact.kind != "give" or again:
        return None
    text, answer = world.rng.choice([
        (f"What did {giver} give to {to}?", thing),
        (f"What did {giver} give to {to}?", thing),  # twice as often as each other question
        (f"Who gave the {thing}?", giver),
        (f"Who gave the {thing} to {to}?", giver),
        (f"Who received the {thing}?", to),
        (f"Who did {giver} give the {thing} to?", to)])
    return text, answer, [fact]


def is_actor_there(world, fact):
    """Half of the questions name the actor's place; after "not", where the actor is not."""
    if fact.kind in HANDLING:
        return None
    told, place = world.told[fact.actor], world.place[fact.actor]
    if told.kind == "not":
        asked, answer = told.thing, "no"
    else:
        other_places = [p for p in world.places if p != place]
        asked = place if world.rng.random() < 0.5 else world.rng.choice(other_places)
        if told.kind == "either":
            answer = "maybe" if asked in told.thing else "no"
        else:
            answer = "yes" if asked == told.thing else "no"
    return f"Is {fact.actor} in the {asked}?", answer, [told]


def dealings(world, actor):
    """The facts in which an actor took, dropped, gave or received something."""
    return [fact for fact in world.facts
            if fact.kind in HANDLING and actor in (fact.actor, fact.to)]


def how_many(world, fact):
    if fact.kind not in HANDLING:
        return None
    number = NUMBERS[len(world.held_by(fact.actor))]
    return f"How many objects is {fact.actor} carrying?", number, dealings(world, fact.actor)


def what_is_carried(world, fact):
    """The object that the actor handled first comes first, in the answer and in its support."""
    if fact.kind not in HANDLING:
        return None
    facts = dealings(world, fact.actor)
    things = list(dict.fromkeys(other.thing for other in facts))
    carried = ",".join(thing for thing in things if world.where[thing] == fact.actor)
    support = sorted(facts, key=lambda other: things.index(other.thing))
    return f"What is {fact.actor} carrying?", carried or "nothing", support


def two_relations(rng, ask_all):
    """Task 4: three rooms in a row, told by two neighbourhoods, and one question or all four."""
    a, middle, b = rng.sample(PLACES, 3)
    direction = rng.choice(list(OPPOSITE))  # from the middle to a
    facts = [(a, direction, middle), (b, OPPOSITE[direction], middle)]
    rng.shuffle(facts)
    facts = [(z, OPPOSITE[d], x) if rng.random() < 0.35 else (x, d, z) for x, d, z in facts]
    told, asked = [], []
    for i, (x, d, z) in enumerate(facts):
        told.append(Line(f"The {x} is {d} of the {z}."))
        asked.append(Line(f"What is {d} of the {z}?", x, (i,)))
        asked.append(Line(f"What is the {z} {OPPOSITE[d]} of?", x, (i,)))
    if ask_all:
        return told + rng.sample(asked, 4)
    about = rng.randrange(2)
    return told + [rng.choice(asked[2 * about:2 * about + 2])]


WALK_AND_CARRY = ("move", "get", "drop")
WALK_AND_GIVE = ("move", "get", "drop", "give")
TOWN = ("bedroom", "cinema", "kitchen", "office", "park", "school")
STORIES = {  # of each task but 4: the world, and what is asked about it
    "qa1": (lambda rng: World(rng, ("move",)), where_is_actor),
    "qa2": (lambda rng: World(rng, WALK_AND_CARRY), where_is_object),
    "qa3": (lambda rng: World(rng, WALK_AND_CARRY, get_there=0.2), where_was_object),
    "qa5": (lambda rng: World(rng, WALK_AND_GIVE, ("Mary", "Fred", "Bill", "Jeff")), who_gave_what),
    "qa6": (lambda rng: World(rng, WALK_AND_CARRY), is_actor_there),
    "qa7": (lambda rng: World(rng, WALK_AND_GIVE), how_many),
    "qa8": (lambda rng: World(rng, WALK_AND_CARRY), what_is_carried),
    "qa9": (lambda rng: World(rng, ("move", "move", "is", "not")), is_actor_there),
    "qa10": (lambda rng: World(rng, ("move", "move", "is", "either"),
                               ("Bill", "Fred", "Julie", "Mary"), TOWN), is_actor_there),
}
TASKS = [f"qa{i}" for i in range(1, 11)]
LABELS = {  # the words that an answer is made of
    **dict.fromkeys(("qa1", "qa2", "qa3", "qa4"), set(PLACES)),
    "qa5": {"Bill", "Fred", "Jeff", "Mary", "apple", "football", "milk"},
    "qa6": {"yes", "no"},
    "qa7": set(NUMBERS),
    "qa8": {"nothing", "apple", "football", "milk"},
    "qa9": {"yes", "no"},
    "qa10": {"yes", "no", "maybe"},
}


def simulate(task, rng, ask=()):
    """
    A story of a task, a list of Lines, drawn from a random.Random.
    ask: tasks; instead of its own questions along the way the story has all of theirs that can be
    asked about it, at its end. Raises ValueError where the task is not known.
    """
    if task not in TASKS:
        raise ValueError(f"task={task} is not known: use one of {', '.join(TASKS)}")
    if task == "qa4":
        return two_relations(rng, ask_all=bool(ask))
    new_world, question = STORIES[task]
    if not ask:
        return tell_and_ask(new_world(rng), question)
    questions = [STORIES[other][1] for other in ask if other in STORIES]
    return tell_then_ask(new_world(rng), questions)


# --- Files

def format_story(story):
    """
    A story in the format of bAbI v1.2: numbered lines, a question with its answer and the numbers
    of its supporting facts behind tabs.
    """
    text = ""
    for number, line in enumerate(story, 1):
        support = " ".join(str(index + 1) for index in line.support)
        text += f"{number} {line.text}"
        text += f" \t{line.answer}\t{support}\n" if line.answer else "\n"
    return text


def read_babi_line(line, number):
    """
    A Line from its text without the number. Fields behind tabs: the answer, and the numbers of
    earlier lines that support it, which may be left out. Raises ValueError.
    """
    fields = [field.strip() for field in line.split("\t")]
    if len(fields) == 1:
        return Line(fields[0])
    support = fields[2].split() if len(fields) > 2 else []
    earlier = {str(n) for n in range(1, number)}
    if len(fields) > 3 or not fields[0] or not fields[1] or not earlier.issuperset(support):
        raise ValueError("expected question, answer and numbers of earlier lines between tabs")
    return Line(fields[0], fields[1], tuple(int(n) - 1 for n in support))


def read_babi(path):
    """
    The stories of a bAbI v1.2 file; blank lines are skipped. Raises ValueError that names file and
    line, or the file where it has no question; OSError where it cannot be read.
    """
    stories = []
    for n, line in enumerate(read_utf8(path).split("\n"), 1):
        if not line.strip():
            continue
        number, _, text = line.strip(" ").partition(" ")
        expected = len(stories[-1]) + 1 if stories else 1
        if number not in ("1", str(expected)) or not text.strip():
            raise ValueError(f"{path}:{n}: expected a sentence numbered 1 (a new story) "
                             f"or {expected}, not {line[:60]!r}")
        if number == "1":
            stories.append([])
        try:
            stories[-1].append(read_babi_line(text, int(number)))
        except ValueError as e:
            raise ValueError(f"{path}:{n}: {e}, not {line[:60]!r}") from None
    if not any(line.answer for story in stories for line in story):
        raise ValueError(f"{path} has no question, as bAbI writes it with its answer behind a tab: "
                         "name another file")
    return stories


def main():
    parser = argparse.ArgumentParser("python -m data.babi", description="Print a bAbI story.")
    parser.add_argument("--task", default="qa1", help="qa1 to qa10 (default qa1)")
    parser.add_argument("--seed", default=1, type=int, help="of the story (default 1)")
    parser.error = lambda message: parser.exit(2, f"error: {message}\n")
    args = parser.parse_args()
    try:
        story = simulate(args.task, random.Random(args.seed))
    except ValueError as e:
        parser.error(e)
    print(format_story(story), end="")


if __name__ == "__main__":
    main()
