"""Which names the demo model learns, and how often: `len` is asked for more than `pyclbr`."""

from __future__ import annotations


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


BUILTIN_TYPES = frozenset(
    _words("""
    bool bytearray bytes complex dict float frozenset int list memoryview object property range
    set slice str tuple type classmethod staticmethod
""")
)

# Asked for most, and shown most.
CORE = _words("""
    itertools functools collections os os.path re json math random threading asyncio pathlib
    datetime subprocess socket logging time sys shutil string
""")

# Known to most who write Python.
COMMON = _words("""
    abc argparse array ast base64 bisect calendar contextlib copy csv dataclasses decimal enum
    fractions glob gzip hashlib heapq io inspect operator pickle platform pprint queue secrets
    select signal sqlite3 statistics struct tempfile textwrap traceback types typing unittest
    urllib.parse urllib.request uuid warnings weakref zipfile zlib concurrent.futures
    collections.abc fnmatch gc getpass http.client http.server importlib multiprocessing
    unittest.mock
""")

# The rest of what a reader may come across.
OTHER = _words("""
    atexit bdb binascii bz2 cProfile cmath cmd code codecs codeop colorsys compileall
    configparser contextvars copyreg dbm difflib dis doctest email.message email.parser
    email.policy email.utils errno faulthandler fcntl filecmp fileinput ftplib getopt gettext
    graphlib grp hmac html html.entities html.parser http http.cookiejar http.cookies imaplib
    importlib.abc importlib.machinery importlib.metadata importlib.resources importlib.util
    ipaddress keyword linecache locale logging.config logging.handlers lzma mailbox marshal
    mimetypes mmap modulefinder multiprocessing.pool multiprocessing.queues
    multiprocessing.shared_memory multiprocessing.synchronize netrc numbers optparse pdb
    pickletools pkgutil plistlib poplib profile pstats pty pwd py_compile pyclbr pydoc quopri
    readline reprlib resource rlcompleter runpy sched selectors shelve shlex site smtplib
    socketserver ssl stat stringprep symtable sysconfig syslog tarfile termios timeit token
    tokenize trace tracemalloc tty unicodedata urllib.error urllib.robotparser venv wave
    webbrowser wsgiref.simple_server wsgiref.util xml.dom.minidom xml.etree.ElementTree xml.sax
    xmlrpc.client xmlrpc.server zipapp zipimport zoneinfo
""")

MODULES = (*CORE, *COMMON, *OTHER)

# Modules whose public name is not the one they are imported by.
SUBMODULE_ALIASES = {"os.path": "posixpath"}

# Names that everybody asks for first.
FAVOURITES = frozenset(
    _words("""
    len print sorted range enumerate zip map filter open isinstance sum min max abs any all
    input iter next reversed round super type id hash repr getattr setattr dict list str int
    float set tuple bool str.join str.split str.strip str.replace str.format str.lower str.upper
    str.startswith str.endswith str.find list.append list.extend list.pop list.sort list.insert
    list.remove list.reverse dict.get dict.items dict.keys dict.values dict.update dict.pop
    dict.setdefault set.add set.union itertools.chain itertools.product itertools.permutations
    itertools.combinations itertools.count itertools.cycle itertools.repeat itertools.groupby
    functools.partial functools.reduce functools.wraps functools.lru_cache functools.cache
    os.getcwd os.listdir os.mkdir os.makedirs os.remove os.rename os.path.join os.path.exists
    os.path.basename os.path.dirname os.path.isfile os.path.isdir re.match re.search re.sub
    re.findall re.compile re.split json.dumps json.loads json.dump json.load math.sqrt
    math.floor math.ceil math.sin math.cos math.gcd math.factorial random.random random.randint
    random.choice random.shuffle random.sample threading.Thread threading.Lock threading.Event
    asyncio.run asyncio.sleep asyncio.gather asyncio.create_task asyncio.wait_for
    collections.Counter collections.deque collections.OrderedDict collections.defaultdict
    collections.namedtuple pathlib.Path datetime.datetime datetime.date datetime.timedelta
    subprocess.run subprocess.Popen socket.socket logging.getLogger time.time time.sleep
    sys.exit shutil.copy ValueError KeyError TypeError IndexError os sys re json math random
    itertools functools collections threading asyncio
""")
)

# What people want to do, and the name that does it.
TASKS = {
    "add an item to a list": "list.append",
    "sort a list": "list.sort",
    "reverse a list": "list.reverse",
    "remove an item from a list": "list.remove",
    "find the length of a list": "len",
    "join strings": "str.join",
    "split a string": "str.split",
    "replace part of a string": "str.replace",
    "strip whitespace from a string": "str.strip",
    "make a string uppercase": "str.upper",
    "make a string lowercase": "str.lower",
    "get the keys of a dict": "dict.keys",
    "get the values of a dict": "dict.values",
    "merge two dicts": "dict.update",
    "add up numbers": "sum",
    "find the largest number": "max",
    "find the smallest number": "min",
    "round a number": "round",
    "read input from the user": "input",
    "print a value": "print",
    "open a file": "open",
    "copy a file": "shutil.copy",
    "delete a file": "os.remove",
    "rename a file": "os.rename",
    "list the files in a directory": "os.listdir",
    "create a directory": "os.mkdir",
    "get the current directory": "os.getcwd",
    "check whether a file exists": "os.path.exists",
    "join paths": "os.path.join",
    "parse JSON": "json.loads",
    "write JSON to a file": "json.dump",
    "read JSON from a file": "json.load",
    "search with a regular expression": "re.search",
    "replace with a regular expression": "re.sub",
    "compute a square root": "math.sqrt",
    "pick a random item": "random.choice",
    "get a random integer": "random.randint",
    "shuffle a list": "random.shuffle",
    "run a command": "subprocess.run",
    "wait a few seconds": "time.sleep",
    "get the current time": "time.time",
    "exit a program": "sys.exit",
    "start a thread": "threading.Thread",
    "run a coroutine": "asyncio.run",
    "run coroutines concurrently": "asyncio.gather",
    "cache the results of a function": "functools.lru_cache",
    "count the items of a list": "collections.Counter",
    "loop with an index": "enumerate",
    "loop over two lists at once": "zip",
    "log a message": "logging.getLogger",
}

# Names that nothing in the standard library has, for questions about what does not exist.
INVENTED = _words("""
    flatten explode teleport juggle fry_eggs make_tea paint_fence sing whistle tickle wobble
    snooze gargle yodel unboil defrost banana pancake wizard dragon robot spaceship volcano
    teapot rainbow_table magic_wand do_everything fix_bugs read_mind guess_password predict
    summarize bake knit harvest plough sail gallop hibernate meditate celebrate
    quicksort mergesort bubble_sort fibonacci is_prime primes fetch_page send_money buy sell
    foo bar baz qux spam eggs frobnicate wibble xyzzy
""")

_SHARES = {
    **dict.fromkeys(OTHER, 1),
    **dict.fromkeys(COMMON, 2),
    **dict.fromkeys(CORE, 3),
}
_OWNERS = sorted(MODULES, key=len, reverse=True)


def share(name: str) -> int:
    """How often one epoch shows `name`."""
    if name in FAVOURITES:
        return 6
    owner = next((m for m in _OWNERS if name == m or name.startswith(f"{m}.")), None)
    if owner is None:
        return 4
    return _SHARES[owner]
