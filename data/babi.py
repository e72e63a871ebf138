"""
The bAbI tasks 1 to 10 (Weston et al. 2015, arXiv 1502.05698): an endless source of stories, and a reader of the original files.

    simulate     a story of a task
    read_babi    the stories of a real bAbI v1.2 file

    python -m data.babi --task=qa3 --seed=1     prints a story
"""
import argparse
import random
from pathlib import Path
from typing import NamedTuple


class Line(NamedTuple):
    text: str            # "Mary moved to the bathroom." or "Where is Mary?"
    answer: str = ""     # of a question ("bathroom", "milk,football", "yes"); "" for a fact
    support: tuple = ()  # of a question: places in the story, from 0, of the facts that support the answer


# --- The simulator. Its rules (which events are how likely, what may be asked when) were found by counting in the original files.

ACTORS = ("John", "Mary", "Sandra", "Daniel")  # gifts prefer the first
PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
OBJECTS = ("apple", "football", "milk")
NUMBERS = ("none", "one", "two", "three")
OPPOSITE = {"north": "south", "south": "north", "east": "west", "west": "east"}
VERBS = {"move": ("went to", "went back to", "moved to", "journeyed to", "travelled to"),
         "get": ("took", "got", "grabbed", "picked up"), "drop": ("dropped", "left", "discarded", "put down"),
         "give": ("gave", "handed", "passed"), "is": ("is in",), "not": ("is not in", "is no longer in"), "either": ("is either in",)}
HANDLING = ("get", "drop", "give")  # what is done with objects; the other verbs tell where an actor is


class Fact(NamedTuple):
    line: int      # its place in the story
    kind: str      # move, get, drop, give; tasks 9 and 10 also tell of moves by is, not, either
    actor: str
    thing: object  # the object, of a move the place, of "either" two places
    to: str        # who is given the object
    told: object   # the fact before this one that tells where the actor is, or None


class World:
    """The story so far: what was told, and how things really stand."""

    def __init__(self, rng, kinds, actors=ACTORS, places=PLACES, get_there=1.0):
        """kinds: of events, one drawn as often as another; get_there: how often an object is taken "there"."""
        self.rng, self.kinds, self.actors, self.places, self.there = rng, kinds, actors, places, dict(zip(HANDLING, (get_there, 0.2, 0)))
        self.place = {actor: rng.choice(places) for actor in actors}
        self.where = {thing: rng.choice(places) for thing in OBJECTS}  # a place, or the actor who holds it
        self.lines, self.facts = [], []
        self.told = {}                                 # actor -> the last fact on where the actor is
        self.handled = {}                              # object -> the last fact on who took, dropped or gave it
        self.walks = {thing: [] for thing in OBJECTS}  # object -> moves of its holder since it was taken

    def held_by(self, actor):
        return [thing for thing in OBJECTS if self.where[thing] == actor]

    def ask(self, text, answer, support):
        self.lines.append(Line(text, answer, tuple(fact.line for fact in support)))

    def event(self):
        """One more event. What cannot be (to take what is not there, to go where one is) is drawn again, which settles how often each
        kind happens. A gift alone is looked for: the first in order of objects and actors that can be made, if any."""
        happened = False
        while not happened:
            kind, actor = self.rng.choice(self.kinds), self.rng.choice(self.actors)
            happened = (self.handle if kind in HANDLING else self.go)(kind, actor)

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
        if kind == "either":
            thing = self.rng.sample([place, self.rng.choice(self.places)], 2)  # the same one twice now and then, as in the original
        words = " or the ".join(thing) if kind == "either" else thing
        fact = self.told[actor] = self.tell(kind, actor, thing, "", f"{actor} {self.rng.choice(VERBS[kind])} the {words}.")
        for held in self.held_by(actor):
            self.walks[held].append(fact)
        return True

    def handle(self, kind, actor):
        if kind == "give":
            choices = [(giver, thing, to) for thing, giver in self.where.items() if giver in self.place
                       for to in self.actors if to != giver and self.place[to] == self.place[giver]]
        else:
            choices = [(actor, thing, "") for thing in self.held_by(self.place[actor] if kind == "get" else actor)]
        if not choices:
            return False
        actor, thing, to = choices[0] if kind == "give" else self.rng.choice(choices)
        ending = f" to {to}" if to else " there" if self.rng.random() < self.there[kind] else ""
        self.handled[thing] = self.tell(kind, actor, thing, to, f"{actor} {self.rng.choice(VERBS[kind])} the {thing}{ending}.")
        self.where[thing] = {"get": actor, "drop": self.place[actor], "give": to}[kind]
        if kind == "get":
            self.walks[thing] = []
        return True


def tell_and_ask(world, question):
    """A story: five times two events and a question(world, fact) -> (text, answer, support) about one of the last five facts; where
    they give nothing to ask (None), two events more."""
    for _ in range(5):
        found = None
        while not found:
            world.event()
            world.event()
            recent = world.facts[-5:]
            world.rng.shuffle(recent)
            found = next(filter(None, (question(world, fact) for fact in recent)), None)
        world.ask(*found)
    return world.lines


def tell_then_ask(world, questions):
    """A story for training: two to ten events (where they give nothing to ask, as many again), and behind them, in any order, all that
    can be asked about them."""
    found = {}
    while not found:
        for _ in range(world.rng.randint(2, 10)):
            world.event()
        found = {asked[0]: asked for question in questions for fact in world.facts if (asked := question(world, fact))}
    for asked in world.rng.sample(list(found.values()), len(found)):
        world.ask(*asked)
    return world.lines


def where_is_actor(world, fact):
    """Of an actor whose place was told, and not what it is not or might be (tasks 9 and 10)."""
    told = world.told.get(fact.actor)
    return told and told.kind in ("move", "is") and (f"Where is {fact.actor}?", told.thing, [told])


def where_is_object(world, fact):
    """Of an object that was dropped, or carried somewhere."""
    if fact.kind not in HANDLING:
        return None
    last = world.handled[fact.thing]
    move = last.told if last.kind == "drop" else next(reversed(world.walks[fact.thing]), None)
    return move and (f"Where is the {fact.thing}?", move.thing, [last, move])


def where_was_object(world, fact):
    """Of an object that was carried to two places or more. It must not have come back to the second."""
    if fact.kind not in HANDLING:
        return None
    walk = world.walks[fact.thing]
    pairs = [(walk[i - 1], walk[i]) for i in range(1, len(walk)) if walk[i].thing not in [move.thing for move in walk[i + 1:]]]
    before, after = world.rng.choice(pairs) if pairs else (None, None)
    return after and (f"Where was the {fact.thing} before the {after.thing}?", before.thing, [world.handled[fact.thing], after, before])


def who_gave_what(world, fact):
    """Of a gift, unless the object, or another one between the same two, was given since: the text would have another answer."""
    later = [other for other in world.facts if other.kind == "give" and other.line > fact.line]
    _, kind, giver, thing, to, _ = fact
    if kind != "give" or any(other.thing == thing or (other.actor, other.to) == (giver, to) for other in later):
        return None
    text, answer = world.rng.choice([
        (f"What did {giver} give to {to}?", thing), (f"What did {giver} give to {to}?", thing),
        (f"Who gave the {thing}?", giver), (f"Who gave the {thing} to {to}?", giver),
        (f"Who received the {thing}?", to), (f"Who did {giver} give the {thing} to?", to)])
    return text, answer, [fact]


def is_actor_there(world, fact):
    """Half of the questions name the place where the actor is; after "not", they name the place where the actor is not."""
    if fact.kind in HANDLING:
        return None
    told, place = world.told[fact.actor], world.place[fact.actor]
    if told.kind == "not":
        asked, answer = told.thing, "no"
    else:
        asked = place if world.rng.random() < 0.5 else world.rng.choice([p for p in world.places if p != place])
        answer = "maybe" if told.kind == "either" and asked in told.thing else "yes" if asked == told.thing else "no"
    return f"Is {fact.actor} in the {asked}?", answer, [told]


def dealings(world, actor):
    """The facts in which an actor took, dropped, gave or received something."""
    return [fact for fact in world.facts if fact.kind in HANDLING and actor in (fact.actor, fact.to)]


def how_many(world, fact):
    number = NUMBERS[len(world.held_by(fact.actor))]
    return fact.kind in HANDLING and (f"How many objects is {fact.actor} carrying?", number, dealings(world, fact.actor))


def what_is_carried(world, fact):
    """The object that the actor handled first comes first, in the answer and in its support."""
    facts = dealings(world, fact.actor)
    things = list(dict.fromkeys(other.thing for other in facts))
    carried = ",".join(thing for thing in things if world.where[thing] == fact.actor)
    return fact.kind in HANDLING and (f"What is {fact.actor} carrying?", carried or "nothing",
                                      sorted(facts, key=lambda other: things.index(other.thing)))


def two_relations(rng, ask_all):
    """Task 4: three rooms in a row, told by two neighbourhoods, and a question about one of them, or all four that can be asked."""
    a, middle, b = rng.sample(PLACES, 3)
    direction = rng.choice(list(OPPOSITE))  # from the middle to a
    facts = [(a, direction, middle), (b, OPPOSITE[direction], middle)]
    rng.shuffle(facts)
    facts = [(z, OPPOSITE[d], x) if rng.random() < 0.35 else (x, d, z) for x, d, z in facts]
    ask = lambda i, x, d, z: [Line(f"What is {d} of the {z}?", x, (i,)), Line(f"What is the {z} {OPPOSITE[d]} of?", x, (i,))]
    asked = [ask(i, *fact) for i, fact in enumerate(facts)]
    questions = rng.sample(asked[0] + asked[1], 4) if ask_all else [rng.choice(asked[rng.randrange(2)])]
    return [*(Line(f"The {x} is {d} of the {z}.") for x, d, z in facts), *questions]


HANDLE, TOWN = ("move", "get", "drop"), ("bedroom", "cinema", "kitchen", "office", "park", "school")
STORIES = {  # of each task but 4: the world, and what is asked about it
    "qa1": (lambda rng: World(rng, ["move"]), where_is_actor),
    "qa2": (lambda rng: World(rng, HANDLE), where_is_object),
    "qa3": (lambda rng: World(rng, HANDLE, get_there=0.2), where_was_object),
    "qa5": (lambda rng: World(rng, (*HANDLE, "give"), ("Mary", "Fred", "Bill", "Jeff")), who_gave_what),
    "qa6": (lambda rng: World(rng, HANDLE), is_actor_there),
    "qa7": (lambda rng: World(rng, (*HANDLE, "give")), how_many),
    "qa8": (lambda rng: World(rng, HANDLE), what_is_carried),
    "qa9": (lambda rng: World(rng, ("move", "move", "is", "not")), is_actor_there),
    "qa10": (lambda rng: World(rng, ("move", "move", "is", "either"), ("Bill", "Fred", "Julie", "Mary"), TOWN), is_actor_there),
}
TASKS = [f"qa{i}" for i in range(1, 11)]
LABELS = {**dict.fromkeys(("qa1", "qa2", "qa3", "qa4"), set(PLACES)), "qa5": {"Bill", "Fred", "Jeff", "Mary", *OBJECTS},
          "qa6": {"yes", "no"}, "qa7": set(NUMBERS), "qa8": {"nothing", *OBJECTS}, "qa9": {"yes", "no"}, "qa10": {"yes", "no", "maybe"}}


def simulate(task, rng, ask=()):
    """
    A story of a task, a list of Lines, drawn from a random.Random. ask: tasks; instead of its own questions along the way the story has
    all of theirs that can be asked about it, at its end. Raises ValueError.
    """
    if task not in TASKS:
        raise ValueError(f"task={task} is not known: use one of {', '.join(TASKS)}")
    if task == "qa4":
        return two_relations(rng, bool(ask))
    world, question = STORIES[task]
    return tell_then_ask(world(rng), [STORIES[other][1] for other in ask if other in STORIES]) if ask else tell_and_ask(world(rng), question)


# --- Files

def format_story(story):
    """A story in the format of bAbI v1.2: numbered lines, a question with its answer and its supporting facts behind tabs."""
    return "".join(f"{i} {line.text}" + (f" \t{line.answer}\t{' '.join(str(s + 1) for s in line.support)}" if line.answer else "") + "\n"
                   for i, line in enumerate(story, 1))


def read_lines(path):
    try:
        return Path(path).read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
    except UnicodeDecodeError as e:
        raise ValueError(f"{path} is not UTF-8 (byte {e.start}): convert it, for example with iconv -t UTF-8") from None


def read_babi(path):
    """The stories of a bAbI v1.2 file. Raises ValueError that names file and line."""
    stories = []
    for n, line in enumerate(read_lines(path), 1):
        number, _, text = line.partition(" ")
        next_number = len(stories[-1]) + 1 if stories else 1
        if number not in ("1", str(next_number)) or not text.strip():
            raise ValueError(f"{path}:{n}: expected a sentence numbered 1 (a new story) or {next_number}, not {line[:60]!r}")
        stories += [[]] if number == "1" else []
        text, *fields = text.split("\t")
        support = fields[1].split() if len(fields) == 2 else ["?"] * len(fields)
        if not all(s.isdecimal() and 1 <= int(s) < int(number) for s in support) or fields and not fields[0].strip():
            raise ValueError(f"{path}:{n}: expected question, answer and numbers of earlier lines between tabs, not {line[:60]!r}")
        stories[-1].append(Line(text.strip(), fields[0].strip() if fields else "", tuple(int(s) - 1 for s in support)))
    return stories


def main():
    parser = argparse.ArgumentParser(prog="python -m data.babi", description="Print a story of a bAbI task.")
    parser.add_argument("--task", default="qa1", help="qa1 to qa10 (default qa1)")
    parser.add_argument("--seed", default=1, type=int, help="of the story (default 1)")
    parser.error = lambda message: parser.exit(2, f"error: {message}\n")
    args = parser.parse_args()
    try:
        print(format_story(simulate(args.task, random.Random(args.seed))), end="")
    except ValueError as e:
        parser.error(e)


if __name__ == "__main__":
    main()
