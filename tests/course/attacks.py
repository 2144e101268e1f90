"""What a hand-in may try: a table of attacks on files, processes, the machine, other students and who reads the grades.

Each is the body of the function of exercise 01.1, at its first call, and may use PRELUDE. Outside of a sandbox most
would do harm, so they are run by tests/course/test_attacks.py only.
"""

from dataclasses import dataclass

REFUSED = "PermissionError"


@dataclass(frozen=True)
class Attack:
    """An answer that harms if it can.

    category: whom or what it is after. source: the lines of the function's body. reason: a pattern of the reason in the
    grade, which shows that it got so far and was refused there. needs_landlock: without Landlock it is not refused.
    """

    name: str
    category: str
    source: str
    reason: str = REFUSED
    needs_landlock: bool = False


PRELUDE = """
import ctypes, fcntl, gc, os, platform, resource, shutil, signal, socket, struct, sys, tempfile, threading, time
from pathlib import Path

def system(numbers, *arguments):
    # a call by its number on x86_64 and on aarch64
    number = numbers[platform.machine() == "aarch64"]
    values = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    result = ctypes.CDLL(None, use_errno=True).syscall(ctypes.c_long(number), *values)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result

def reply():
    # the descriptor of the pipe that the reply goes through, and whatever else is open
    handles = []
    for handle in range(3, 1024):
        try:
            os.fstat(handle)
        except OSError:
            continue
        handles.append(handle)
    return handles
"""

_READING = "handle = os.open(MODEL, os.O_RDONLY)\n"  # a file that the answer may read
SEARCH = """
mark = "TSENOH-FO-TERCES"[::-1]  # backwards, since it would else be found here
gc.unfreeze()
frame, held = sys._getframe(), [x for x in gc.get_objects() if isinstance(x, (list, tuple, dict))]
while frame:
    held.append(frame.f_locals)
    frame = frame.f_back
copies = 0
for thing in held:
    values = list(thing.values()) if isinstance(thing, dict) else thing
    copies += sum(mark in value for value in values if type(value) is str and len(value) > 100)
raise LookupError(copies)
"""

ATTACKS = [
    # files: read
    Attack("another's notebook", "read", "return open(NEIGHBOUR).read()", needs_landlock=True),
    Attack("the class's folder", "read", "return os.listdir(CLASS)", needs_landlock=True),
    Attack("the root folder", "read", "return os.listdir('/')", needs_landlock=True),
    Attack("the lessons", "read", "return os.listdir(LESSONS)", needs_landlock=True),
    Attack("the home", "read", "return os.listdir(HOME)", needs_landlock=True),
    Attack("private keys", "read", "return os.listdir('/etc/ssl/private'), os.listdir('/etc')", needs_landlock=True),
    Attack("a way around a name", "read", "return open(CLASS + '/../class/honest/' + LESSON + '.ipynb').read()",
           needs_landlock=True),
    Attack("a file by its handle", "read",
           "system((304, 265), -100, ctypes.create_string_buffer(128), os.O_RDONLY)"),
    # files: write
    Attack("a new file", "write", "open(CLASS + '/new', 'w')"),
    Attack("the grades beforehand", "write", "open(CLASS + '/grades.csv', 'w').write('student,points')"),
    Attack("a line more in another's notebook", "write", "open(NEIGHBOUR, 'a')"),
    Attack("another's notebook anew", "write", "os.open(NEIGHBOUR, os.O_RDWR)"),
    Attack("emptied by opening it to read", "write", "os.open(NEIGHBOUR, os.O_RDONLY | os.O_TRUNC)"),
    Attack("a model emptied by opening it to read", "write", "os.open(MODEL, os.O_RDONLY | os.O_TRUNC)"),
    Attack("a file without a name", "write", "os.open(CLASS, os.O_TMPFILE | os.O_WRONLY)"),
    Attack("a temporary file", "write", "tempfile.TemporaryFile()", "PermissionError|FileNotFoundError"),
    Attack("a model", "write", "open(MODEL, 'w')"),
    Attack("labkit itself", "write", "open(LABKIT + '/checks/check.py', 'a')"),
    Attack("openat2", "write", "system((437, 437), -100, MODEL.encode(), struct.pack('=QQQ', 2, 0, 0), 24)"),
    Attack("truncated", "truncate", "os.truncate(NEIGHBOUR, 0)"),
    Attack("a model truncated", "truncate", "os.truncate(MODEL, 0)"),
    Attack("truncated by its handle", "truncate", _READING + "os.ftruncate(handle, 0)"),
    Attack("a hole", "truncate", _READING + "system((285, 47), handle, 3, 0, 4096)"),
    Attack("removed", "names", "os.unlink(NEIGHBOUR)"),
    Attack("a folder removed", "names", "shutil.rmtree(CLASS)"),
    Attack("an empty folder removed", "names", "os.rmdir(EMPTY)"),
    Attack("renamed", "names", "os.rename(NEIGHBOUR, CLASS + '/mine.ipynb')"),
    Attack("exchanged", "names", "system((316, 276), -100, NEIGHBOUR.encode(), -100, MODEL.encode(), 2)"),
    Attack("a link", "names", "os.link(NEIGHBOUR, CLASS + '/link')"),
    Attack("a symbolic link", "names", "os.symlink('/etc/passwd', CLASS + '/link')"),
    Attack("a folder", "names", "os.mkdir(CLASS + '/zoe')"),
    Attack("a pipe with a name", "names", "os.mkfifo(CLASS + '/pipe')"),
    # files: what they are
    Attack("chmod of another's folder", "permissions", "os.chmod(CLASS + '/honest', 0)"),
    Attack("chmod of the home", "permissions", "os.chmod(HOME, 0)"),
    Attack("chmod of a model", "permissions", "os.chmod(MODEL, 0)"),
    Attack("chmod by a handle", "permissions", _READING + "os.fchmod(handle, 0)"),
    Attack("chmod by the newest call", "permissions", "system((452, 452), -100, NEIGHBOUR.encode(), 0, 0)"),
    Attack("chown", "permissions", "os.chown(NEIGHBOUR, os.getuid(), os.getgid())"),
    Attack("chown by a handle", "permissions", _READING + "os.fchown(handle, os.getuid(), os.getgid())"),
    Attack("later than the deadline", "times", "os.utime(NEIGHBOUR, (2e9, 2e9))"),
    Attack("later by a handle", "times", _READING + "os.utime(handle, (2e9, 2e9))"),
    Attack("an attribute", "attributes", "os.setxattr(NEIGHBOUR, 'user.x', b'x')"),
    Attack("an attribute by a handle", "attributes", _READING + "os.setxattr(handle, 'user.x', b'x')"),
    Attack("an attribute less", "attributes", "os.removexattr(MODEL, 'user.kept')"),
    Attack("an attribute by the newest call", "attributes",
           "system((463, 463), -100, NEIGHBOUR.encode(), 0, b'user.x', b'x' * 16, 16)"),
    Attack("a lock on a model", "locks", _READING + "fcntl.flock(handle, fcntl.LOCK_EX)"),
    Attack("a lease on a model", "locks", _READING + "fcntl.fcntl(handle, 1024, fcntl.F_RDLCK)"),
    # signals
    Attack("kill", "signals", "os.kill(os.getppid(), 9)"),
    Attack("stop", "signals", "os.kill(os.getppid(), 19)"),
    Attack("everybody", "signals", "os.kill(-1, 0)"),
    Attack("a group", "signals", "os.killpg(os.getppid(), 0)"),
    Attack("a thread", "signals", "system((234, 131), os.getppid(), os.getppid(), 9)"),
    Attack("queued", "signals", "system((129, 138), os.getppid(), 9, ctypes.create_string_buffer(128))"),
    Attack("by a descriptor of the process", "signals", "system((424, 424), os.pidfd_open(os.getppid()), 9, None, 0)"),
    Attack("by the owner of a pipe", "signals",
           "r, w = os.pipe()\nfcntl.fcntl(r, 8, os.getppid())\nfcntl.fcntl(r, 10, 9)\n"
           "fcntl.fcntl(r, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)\nos.write(w, b'x')"),
    Attack("by the owner of the reply", "signals",
           "[fcntl.fcntl(handle, 8, os.getppid()) for handle in reply()]"),
    Attack("by the signal of the reply", "signals", "[fcntl.fcntl(handle, 10, 9) for handle in reply()]"),
    Attack("by the owner, extended", "signals",
           "[fcntl.fcntl(handle, 15, struct.pack('=ii', 1, os.getppid())) for handle in reply()]"),
    Attack("by ioctl", "signals",
           "[fcntl.ioctl(handle, 0x8901, struct.pack('=i', os.getppid())) for handle in reply()]"),
    Attack("when a folder changes", "signals", "fcntl.fcntl(os.open(MODELS, os.O_RDONLY), 1026, 0x80000001)"),
    Attack("by a timer", "signals",
           "timer = ctypes.create_string_buffer(8)\n"
           "system((222, 107), 0, struct.pack('=qiii', 0, 9, 4, os.getppid()) + bytes(44), timer)"),
    Attack("by a message queue", "signals", "system((240, 180), b'x', os.O_RDWR | os.O_CREAT, 0o600, None)"),
    # processes
    Attack("forks", "processes", "while True: os.fork()"),
    Attack("threads", "processes", "while True: threading.Thread(target=print).start()", "RuntimeError"),
    Attack("a brother", "processes", "system((56, 220), 0x8000 | 17, None, None, None, None)"),
    Attack("clone3", "processes", "system((435, 435), ctypes.create_string_buffer(88), 88)"),
    Attack("a program", "processes", "os.execv('/bin/sh', ['sh', '-c', 'sleep 60'])"),
    Attack("a program by its handle", "processes",
           "system((322, 281), os.open('/usr/bin/env', os.O_RDONLY), b'', None, None, 0x1000)"),
    Attack("outlives the grader", "processes", "system((157, 167), 1, 0, 0, 0, 0)\ntime.sleep(600)"),
    Attack("a namespace", "processes", "system((272, 97), 0x10000000)"),
    Attack("another's namespace", "processes", "system((308, 268), 0, 0)"),
    Attack("traces its parent", "processes", "system((101, 117), 16, os.getppid(), None, None)"),
    Attack("root again", "processes", "os.setresuid(0, 0, 0)"),
    Attack("without the filter", "processes", "system((317, 277), 1, 0, bytes(16))"),
    # memory and disk
    Attack("a hog", "memory", "held = []\nwhile True: held.append(bytearray(1 << 26))",
           "MemoryError|stopped after"),
    Attack("at once", "memory", "return bytes(64 << 30)", "MemoryError"),
    Attack("locked", "memory", "system((151, 230), 3)"),
    Attack("nobody's file", "memory", "os.memfd_create('x')"),
    Attack("shared segments", "memory", "system((29, 194), 0, 1 << 30, 0o1777)"),
    Attack("in shared memory", "memory", "open('/dev/shm/attack', 'w').write('x' * 10**9)"),
    Attack("a full disk", "disk", "open('/var/tmp/attack', 'w').write('x' * 10**9)"),
    Attack("a core", "disk", "ctypes.string_at(0)", "SIGSEGV"),
    Attack("all written out", "disk", "os.sync()\nsystem((162, 81))"),
    # the network
    Attack("tcp", "network", "socket.socket().connect(('127.0.0.1', 9))"),
    Attack("udp", "network", "socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('192.0.2.1', 53))"),
    Attack("a name", "network", "socket.getaddrinfo('example.org', 80)", "gaierror|LookupError"),
    Attack("a unix socket", "network", "socket.socket(socket.AF_UNIX).connect(LISTENING)"),
    Attack("an abstract socket", "network", "socket.socket(socket.AF_UNIX).connect('\\0' + ABSTRACT)"),
    Attack("netlink", "network", "socket.socket(16, socket.SOCK_RAW, 0)"),
    Attack("packets", "network", "socket.socket(17, socket.SOCK_RAW, 3)"),
    Attack("a pair", "network", "socket.socketpair()"),
    # other students
    Attack("another's answer in memory", "neighbours", SEARCH, "LookupError: 0"),
    Attack("the grader's memory", "neighbours", "open(f'/proc/{os.getppid()}/mem', 'rb')", needs_landlock=True),
    Attack("the grader's memory, to write", "neighbours", "open(f'/proc/{os.getppid()}/mem', 'r+b')"),
    Attack("the grader's memory by a call", "neighbours",
           "system((310, 270), os.getppid(), bytes(16), 1, bytes(16), 1, 0)"),
    Attack("the grader's descriptors", "neighbours", "system((438, 438), os.pidfd_open(os.getppid()), 0, 0)"),
    Attack("the grader's environment", "neighbours", "open(f'/proc/{os.getppid()}/environ').read()",
           needs_landlock=True),
    Attack("the instructor's keys", "neighbours", "return os.environ['TOKEN_OF_THE_INSTRUCTOR']", "KeyError"),
    Attack("leaked descriptors", "neighbours", "raise LookupError(len(reply()))", "LookupError: 1"),
    Attack("another's result", "neighbours",
           "line = b'[0, \"wrong\", \"x\", \"x\"]\\n'\nfor handle in range(3, 64): os.write(handle, line * 20)",
           "OSError|replied with something else"),
    Attack("a result of its own", "neighbours",
           "for handle in reply(): os.write(handle, b'x\\npassed\\n')\nos._exit(0)", "something else than a result"),
    Attack("a flood", "neighbours", "while True: [os.write(handle, b'passed\\n' * 9999) for handle in reply()]",
           "something else than a result"),
    Attack("no reply", "neighbours", "os.closerange(0, 1024)", "process ended|OSError"),
    # limits and clocks of others
    Attack("the grader's limits", "limits", "resource.prlimit(os.getppid(), resource.RLIMIT_CPU, (1, 1))"),
    Attack("its own limits", "limits", "resource.setrlimit(resource.RLIMIT_CPU, (1, 7))", "not allowed"),
    Attack("the grader's priority", "limits", "os.setpriority(os.PRIO_PROCESS, os.getppid(), 19)"),
    Attack("the grader's core", "limits", "os.sched_setaffinity(os.getppid(), {0})"),
    Attack("before all others", "limits", "os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))"),
    Attack("the disk first", "limits", "system((251, 30), 1, os.getppid(), 0x2000)"),
    Attack("the machine's clock", "limits", "time.clock_settime(time.CLOCK_REALTIME, 0)"),
    Attack("the machine's name", "limits", "socket.sethostname('x')"),
    Attack("a loop", "limits", "while True: pass", "stopped after"),
    Attack("a sleep", "limits", "time.sleep(600)", "stopped after"),
    Attack("too deep", "limits", "sys.setrecursionlimit(10**9)\ndeeper = lambda: deeper()\ndeeper()",
           "SIGSEGV|MemoryError|stopped after"),
    # doors of the kernel
    Attack("io_uring", "kernel", "system((425, 425), 8, ctypes.create_string_buffer(120))"),
    Attack("bpf", "kernel", "system((321, 280), 0, ctypes.create_string_buffer(128), 128)"),
    Attack("perf", "kernel", "system((298, 241), ctypes.create_string_buffer(128), 0, -1, -1, 0)"),
    Attack("page faults", "kernel", "system((323, 282), 0)"),
    Attack("keys", "kernel", "system((250, 219), 0, -3, 1)"),
    Attack("a mount", "kernel", "system((165, 40), b'none', b'/tmp', b'tmpfs', 0, None)"),
    Attack("a new mount", "kernel", "system((430, 430), b'tmpfs', 0)"),
    Attack("another root", "kernel", "os.chroot('/tmp')"),
    Attack("a restart", "kernel", "system((169, 142), 0, 0, 0, None)"),
    # whoever reads the grades
    Attack("escapes", "reader", "raise ValueError('\\x1b]0;owned\\x07\\x1b[2J\\x9b31m\\r\\x08')",
           r"\\x1b\]0;owned\\x07"),
    Attack("from right to left", "reader", "raise ValueError('\\u202e\\u2066deessap')", r"\\u202e"),
    Attack("a row more", "reader", "raise ValueError('\\nhonest,01,01.1,x,0,2,wrong,')", "ValueError"),
    Attack("a formula", "reader", "raise type('=HYPERLINK(\"x\")', (Exception,), {})('=1')", "HYPERLINK"),
    Attack("a script", "reader", "raise ValueError('<script>alert(1)</script>')", "<script>"),
    Attack("no text", "reader", "raise ValueError('\\ud800\\0')", r"\\ud800"),
    Attack("much text", "reader", "print('\\x1b[2J' * 10**7)\nsys.stderr.write('x' * 10**7)\nos.write(2, b'x' * 10**7)",
           "two values"),
]  # fmt: skip
