"""A process that has imported the library and forks a child for each command, because the import takes ten seconds.

It computes nothing itself, so a child starts as a new process would. Requests and replies are lines of JSON.
"""

import contextlib
import io
import json
import os
import resource
import signal
import sys
import time
from pathlib import Path

EXIT_UNCAUGHT = 70  # what the child returns when an exception passed all handlers; the traceback is on stderr
MODULES = (  # of other packages
    'fastai.vision.all',
    'timm',
    'sklearn.linear_model',
    'sklearn.model_selection',
    'scipy.ndimage',
    'scipy.stats',
    'matplotlib.pyplot',
    'safetensors.torch',
    'imagehash',
    'tqdm',
    'pydicom',
    'pydicom.pixels',
    'nibabel',
    'onnxruntime',
)
# Programs that the library and its dependencies start to get information on the machine.
HARMLESS = ('uname', 'lscpu', 'nproc', 'ldconfig')


def load():
    "Import everything that a command may need; packages that are not installed are skipped."
    import importlib
    import pkgutil

    import dr_transfer

    for name in MODULES:
        with contextlib.suppress(ImportError):  # some are optional
            importlib.import_module(name)
    for module in pkgutil.walk_packages(dr_transfer.__path__, 'dr_transfer.'):
        importlib.import_module(module.name)


def memory(field):
    "A size of this process in bytes: of its address space (0) or of what is in memory (1)."
    return int(Path('/proc/self/statm').read_text().split()[field]) * os.sysconf('SC_PAGE_SIZE')


def watch(path):
    "Note each program that is started, and each connection, in a file."

    def hook(event, args):
        if event == 'subprocess.Popen':
            program = args[0] or args[1][0]
            if os.path.basename(os.fsdecode(program)) in HARMLESS:
                return
        elif event not in ('os.system', 'os.exec', 'os.posix_spawn', 'socket.connect', 'socket.getaddrinfo'):
            return
        with open(path, 'a', encoding='utf-8', errors='backslashreplace') as f:
            f.write(f'{event} {args!r}\n')

    sys.addaudithook(hook)


def connect_output(job):
    "Standard input, output and error as the job wants them."
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(os.open(job['stderr'], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    sys.stderr = io.TextIOWrapper(
        io.FileIO(2, 'w', closefd=False), encoding=job['encoding'], errors='backslashreplace', write_through=True
    )
    sys.__stderr__ = sys.stderr
    if job['stdout'] is None:
        os.close(1)
        sys.stdout = sys.__stdout__ = None  # as Python itself does
        return
    if job['stdout'] == 'broken pipe':
        reader, writer = os.pipe()
        os.close(reader)
        os.dup2(writer, 1)
    else:
        os.dup2(os.open(job['stdout'], os.O_WRONLY | os.O_CREAT), 1)
    sys.stdout = io.TextIOWrapper(io.BufferedWriter(io.FileIO(1, 'w', closefd=False)), encoding=job['encoding'])
    sys.__stdout__ = sys.stdout


def prepare(job, address_space):
    "Set up this forked process as the job describes."
    import tempfile

    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    resource.setrlimit(resource.RLIMIT_AS, (address_space + job['address_space'],) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (job['cpu'] + 5, job['cpu'] + 6))
    connect_output(job)
    os.environ.update(job['environment'])
    os.umask(0o022)
    tempfile.tempdir = None
    os.chdir(job['folder'])
    watch(job['events'])
    if job['files']:
        resource.setrlimit(resource.RLIMIT_NOFILE, (job['files'],) * 2)


def work(job):
    "The exit code of the command, or of the function, that the job names."
    if not job['call']:
        from dr_transfer.cli import main

        return main(job['words'])
    import calls

    try:
        return getattr(calls, job['call'])(*job['words'])
    except (ValueError, OSError) as e:  # as the command reports the same error
        print(f'dr_transfer: error: {" ".join(str(e).split())}', file=sys.stderr)
        return 1


def child(job, address_space):
    "Run a job in this forked process and return its exit code, after what Python does at the end of a program."
    import traceback

    prepare(job, address_space)
    try:
        code = work(job)
    except SystemExit as e:
        code = e.code
    except BaseException:  # the traceback is what the test looks for
        traceback.print_exc()
        code = EXIT_UNCAUGHT
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except Exception as e:
        print(f'Exception ignored while flushing stdout: {e!r}', file=sys.stderr)
        code = 120
    return code if isinstance(code, int) else int(code is not None)


def fork(job):
    "The number of a new process that runs the job."
    address_space = memory(0)
    pid = os.fork()
    if pid:
        return pid
    try:
        code = child(job, address_space)
    except BaseException as e:
        os.write(2, f'Traceback of the server: {e!r}\n'.encode())
        code = EXIT_UNCAUGHT
    os._exit(code & 255)


def ticks_of(pid) -> int:
    "Ticks of processor time that a process has used, those of its ended children too; 0 if it has ended."
    try:
        fields = Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()
    except OSError:
        return 0
    return sum(map(int, fields[11:15]))


def processor_time(pid) -> int:
    "Ticks of a process and of those that it has started."
    try:
        children = Path(f'/proc/{pid}/task/{pid}/children').read_text().split()
    except OSError:
        children = []
    return ticks_of(pid) + sum(map(ticks_of, children))


def kill(pid):
    "End a process and all that it started."
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:  # it was just started and has no process group yet
        os.kill(pid, signal.SIGKILL)


def end(pid, wall, idle):
    """Wait for a process: exit status, what it used, and whether it was ended.

    It is ended when it has run for `wall` seconds, or has used no processor for `idle` seconds, because it waits.
    On a machine with other work to do, a command takes longer, but it does not wait.
    """
    start = busy = time.monotonic()
    pause = 0.002
    ticks = 0
    while True:
        done, status, used = os.wait4(pid, os.WNOHANG)
        if done:
            return status, used, False
        now = time.monotonic()
        before = ticks
        ticks = processor_time(pid)
        busy = now if ticks != before else busy
        if now > start + wall or now > busy + idle:
            kill(pid)
            _, status, used = os.wait4(pid, 0)
            return status, used, True
        time.sleep(pause)
        pause = min(0.02, pause * 1.3)


def answer(job):
    "Run one job; how it ended and what it took."
    before = memory(1)
    start = time.monotonic()
    status, used, stopped = end(fork(job), job['wall'], job['idle'])
    return {
        'code': os.waitstatus_to_exitcode(status),
        'stopped': stopped,
        'seconds': time.monotonic() - start,
        'cpu': used.ru_utime + used.ru_stime,
        'peak': max(0, used.ru_maxrss * 1024 - before),
    }


def main():
    "Serve requests until standard input ends."
    replies = os.fdopen(os.dup(1), 'w', encoding='ascii')
    os.dup2(2, 1)  # what an import prints is no reply
    here = Path(__file__).resolve().parent
    sys.path[:0] = [str(here), str(here.parents[1])]  # the library of this checkout
    load()
    print(json.dumps({'ready': True}), file=replies, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), file=replies, flush=True)


if __name__ == '__main__':
    main()
