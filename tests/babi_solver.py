"""Solves bAbI stories independently: it knows only the sentences, and looks back through them."""
import re

WORDS = {"N": "Mary John Sandra Daniel Bill Fred Jeff Julie",
         "O": "apple football milk",
         "P": "bathroom bedroom garden hallway kitchen office cinema park school"}
VERBS = {"move": "went moved journeyed travelled", "get": "took got grabbed picked",
         "drop": "dropped left discarded put", "give": "gave handed passed"}
OPPOSITE = {"north": "south", "south": "north", "west": "east", "east": "west"}


def template(text):
    """"Mary took the milk." -> "N took the O." """
    for letter, words in WORDS.items():
        text = re.sub(rf"\b({words.replace(' ', '|')})\b", letter, text)
    return text


def words_of(fact):
    """The words of a fact, without its full stop and "there"."""
    return fact.removesuffix(".").removesuffix(" there").split()


def kind(words):
    """move, get, drop or give; None for another fact."""
    return next((k for k, verbs in VERBS.items() if words[1] in verbs.split()), None)


def tells_where(words, actor):
    return words[0] == actor and kind(words) not in ("get", "drop", "give")


def last(facts, condition):
    """The last of the facts that fulfils the condition."""
    return next(fact for fact in reversed(facts) if condition(fact))


def holders(facts, thing):
    """After each fact: who holds the thing (None: nobody, as far as was told)."""
    holder, found = None, []
    for words in facts:
        if thing in words:
            holder = {"get": words[0], "give": words[-1], "drop": None}[kind(words)]
        found.append(holder)
    return found


def trail(facts, thing):
    """The places where the thing was known to be, in order."""
    places, found = {}, []
    for words, holder in zip(facts, holders(facts, thing)):
        if kind(words) == "move":
            places[words[0]] = words[-1]
        place = places.get(holder) if holder else None
        if place and found[-1:] != [place]:
            found.append(place)
    return found


def solve_carrying(facts, ask):
    """How many objects is Mary carrying? What is Mary carrying?"""
    actor = ask[-2]
    handled = [f for f in facts if kind(f) != "move" and actor in f]
    things = list(dict.fromkeys(f[-3] if kind(f) == "give" else f[-1] for f in handled))
    carried = [thing for thing in things if holders(facts, thing)[-1] == actor]
    if ask[0] == "How":
        return ["none", "one", "two", "three"][len(carried)]
    return ",".join(carried) or "nothing"


def solve_is(facts, ask):
    """Is Mary in the kitchen?"""
    fact = last(facts, lambda f: tells_where(f, ask[1]))
    if "either" in fact:
        return "maybe" if ask[-1] in fact else "no"
    return "yes" if fact[-1] == ask[-1] and not {"no", "not"} & set(fact) else "no"


def solve_rooms(facts, ask):
    """What is north of the kitchen? What is the kitchen north of?"""
    known = {(f[3], f[-1]): f[1] for f in facts}
    known |= {(OPPOSITE[f[3]], f[1]): f[-1] for f in facts}
    return known[ask[2], ask[-1]] if ask[2] in OPPOSITE else known[OPPOSITE[ask[4]], ask[3]]


def solve_gift(facts, ask):
    """What did Bill give to Fred? Who gave the milk (to Fred)? Who received the milk? ..."""
    patterns = (r"What did (?P<giver>\w+) give to (?P<to>\w+)", r"Who received the (?P<thing>\w+)",
                r"Who gave the (?P<thing>\w+)( to (?P<to>\w+))?",
                r"Who did (?P<giver>\w+) give the (?P<thing>\w+) to")
    match = next(filter(None, (re.fullmatch(p, " ".join(ask)) for p in patterns))).groupdict()
    asked = {0: match.get("giver"), -3: match.get("thing"), -1: match.get("to")}
    gift = last(facts, lambda f: kind(f) == "give" and all(
        word in (None, f[index]) for index, word in asked.items()))
    if ask[0] == "What":
        return gift[-3]
    return gift[0] if ask[1] == "gave" else gift[-1]


def solve(sentences, question):
    """The answer, from the text alone."""
    facts, ask = [words_of(s) for s in sentences], question.removesuffix("?").split()
    if ask[:2] == ["Where", "was"]:
        places = trail(facts, ask[3])
        last_time = len(places) - 1 - places[::-1].index(ask[-1])
        return places[last_time - 1]
    if ask[0] == "Where" and ask[-1] in WORDS["O"].split():
        return trail(facts, ask[-1])[-1]
    if ask[0] == "Where":
        return last(facts, lambda f: tells_where(f, ask[-1]))[-1]
    if ask[-1] == "carrying":
        return solve_carrying(facts, ask)
    if ask[0] == "Is":
        return solve_is(facts, ask)
    return solve_rooms(facts, ask) if facts[0][0] == "The" else solve_gift(facts, ask)
