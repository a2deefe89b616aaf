// Killing a process right before one of its system calls that change a file.
//
// The tracer is a process of its own, this test program once more: it stops every thread
// of the other at each of its system calls, counts those that change a file or a name
// below a directory, and kills instead of letting the one go on that it was told. The
// traced program needs no hook for that, and no call is left out because nobody thought
// of it.

package test

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// tracing, in the environment, makes this program a tracer.
const tracing = "BLKSNAP_TEST_TRACE"

// tracer stops a process at its system calls.
type tracer struct {
	t     *testing.T
	stdin io.Closer
	lines *bufio.Scanner
	cmd   *exec.Cmd
}

// trace kills the process pid right before the k-th of its system calls from now on
// that changes something below dir. It returns when each of its threads is traced.
func trace(t *testing.T, pid int, dir string, k int) *tracer {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), tracing+"="+fmt.Sprintf("%d %d %s", pid, k, dir))
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { stdin.Close() })
	tr := &tracer{t, stdin, bufio.NewScanner(stdout), cmd}
	if !tr.lines.Scan() || tr.lines.Text() != "traced" {
		t.Fatalf("tracer of process %d: %q, %v", pid, tr.lines.Text(), cmd.Wait())
	}
	return tr
}

// end lets the process go, if it still lives, and returns the calls that it made: the
// last is the one that it was killed at, if it was.
func (tr *tracer) end() (calls []string, killed bool) {
	tr.t.Helper()
	tr.stdin.Close()
	for tr.lines.Scan() {
		call, last := strings.CutPrefix(tr.lines.Text(), "killed at ")
		calls, killed = append(calls, call), last
	}
	if err := tr.cmd.Wait(); err != nil {
		tr.t.Fatalf("tracer: %v", err)
	}
	return calls, killed
}

// runTracer is what the tracer does, as order says.
func runTracer(order string) error {
	var tr tracee
	if _, err := fmt.Sscanf(order, "%d %d %s", &tr.pid, &tr.left, &tr.dir); err != nil {
		return err
	}
	runtime.LockOSThread() // only the thread that traces may go on with it
	if err := tr.seize(); err != nil {
		return fmt.Errorf("trace process %d: %w", tr.pid, err)
	}
	fmt.Println("traced")
	go func() {
		io.Copy(io.Discard, os.Stdin)
		os.Exit(0) // the kernel lets go what we trace
	}()
	return tr.follow()
}

// tracee is the process that is traced.
type tracee struct {
	pid  int
	dir  string
	left int // how many calls are left until it is killed
}

// seize stops all threads and begins to trace them.
func (tr *tracee) seize() error {
	seized := make(map[int]bool)
	for more := true; more; { // until no thread has come about meanwhile
		more = false
		tasks, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", tr.pid))
		if err != nil {
			return err
		}
		for _, task := range tasks {
			tid, err := strconv.Atoi(task.Name())
			if err != nil || seized[tid] {
				continue
			}
			const options = unix.PTRACE_O_TRACESYSGOOD | unix.PTRACE_O_TRACECLONE | unix.PTRACE_O_TRACEEXEC
			err = ptrace(unix.PTRACE_SEIZE, tid, 0, options)
			if errors.Is(err, unix.EPERM) && isTracedBy(tr.pid, tid, os.Getpid()) {
				err = nil // cloned by one that is traced
			} else if err == nil {
				err = ptrace(unix.PTRACE_INTERRUPT, tid, 0, 0)
			}
			if err != nil && !errors.Is(err, unix.ESRCH) {
				return err
			}
			seized[tid], more = true, true
		}
	}
	return nil
}

func isTracedBy(pid, tid, tracer int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/status", pid, tid))
	return err == nil && strings.Contains(string(b), fmt.Sprintf("\nTracerPid:\t%d\n", tracer))
}

// follow lets the process go on from stop to stop, until it has ended.
func (tr *tracee) follow() error {
	for {
		var ws unix.WaitStatus
		tid, err := unix.Wait4(-1, &ws, unix.WALL, nil)
		switch {
		case errors.Is(err, unix.ECHILD):
			return nil
		case errors.Is(err, unix.EINTR) || err == nil && !ws.Stopped():
			continue
		case err != nil:
			return err
		}
		signal := uintptr(0)
		switch {
		case ws.StopSignal() == unix.SIGTRAP|0x80:
			if err := tr.atCall(tid); err != nil && !errors.Is(err, unix.ESRCH) {
				return err
			}
		case int(ws)>>16 == 0: // not an event: the signal is for the thread
			signal = uintptr(ws.StopSignal())
		}
		// One that was killed meanwhile is not there any more.
		if err := ptrace(unix.PTRACE_SYSCALL, tid, 0, signal); err != nil && !errors.Is(err, unix.ESRCH) {
			return err
		}
	}
}

// call is a system call that a thread is about to make: ptrace(2),
// PTRACE_GET_SYSCALL_INFO.
type call struct {
	op     uint8
	_      [3]uint8
	_      uint32
	_      [2]uint64
	number uint64
	args   [6]uint64
	_      [16]byte
}

// atCall looks at the call that a thread makes.
func (tr *tracee) atCall(tid int) error {
	const entry = 1
	var c call
	_, _, errno := unix.Syscall6(unix.SYS_PTRACE, unix.PTRACE_GET_SYSCALL_INFO, uintptr(tid), unsafe.Sizeof(c), uintptr(unsafe.Pointer(&c)), 0, 0)
	if errno != 0 {
		return errno
	}
	if c.op != entry {
		return nil
	}
	what := tr.change(tid, &c)
	if what == "" {
		return nil
	}
	if tr.left--; tr.left != 0 {
		fmt.Println(what)
		return nil
	}
	fmt.Println("killed at " + what)
	return unix.Kill(tr.pid, unix.SIGKILL)
}

// change names the call, and the file where that is known, if it changes anything.
func (tr *tracee) change(tid int, c *call) string {
	switch c.number {
	case unix.SYS_WRITE, unix.SYS_PWRITE64, unix.SYS_WRITEV, unix.SYS_PWRITEV, unix.SYS_PWRITEV2:
		return tr.ofFile("write", tid, c.args[0])
	case unix.SYS_FALLOCATE:
		return tr.ofFile("fallocate", tid, c.args[0])
	case unix.SYS_FTRUNCATE:
		return tr.ofFile("ftruncate", tid, c.args[0])
	case unix.SYS_FSETXATTR, unix.SYS_FREMOVEXATTR:
		return tr.ofFile("set an attribute", tid, c.args[0])
	case unix.SYS_COPY_FILE_RANGE:
		return tr.ofFile("copy", tid, c.args[2])
	case unix.SYS_TRUNCATE:
		return tr.ofName("truncate", tid, c.args[0])
	case unix.SYS_OPENAT:
		if c.args[2]&(unix.O_CREAT|unix.O_TRUNC) != 0 {
			return tr.ofName("create", tid, c.args[1])
		}
	case unix.SYS_MKDIRAT:
		return tr.ofName("mkdir", tid, c.args[1])
	case unix.SYS_UNLINKAT:
		return tr.ofName("unlink", tid, c.args[1])
	case unix.SYS_RENAMEAT, unix.SYS_RENAMEAT2:
		return tr.ofName("rename", tid, c.args[1])
	case unix.SYS_LINKAT, unix.SYS_SYMLINKAT, unix.SYS_FCHMODAT, unix.SYS_UTIMENSAT:
		return tr.ofName("change", tid, c.args[1])
	}
	return ""
}

// ofFile is what, of a file in the directory, and nothing for any other.
func (tr *tracee) ofFile(what string, tid int, fd uint64) string {
	path, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/%d", tid, int32(fd)))
	if name, ok := strings.CutPrefix(path, tr.dir+"/"); ok && err == nil {
		return what + " " + name
	}
	return ""
}

// ofName is what, of the path at an address of the process, and nothing if that leads
// elsewhere. One that does not begin at the root is taken for one below the directory.
func (tr *tracee) ofName(what string, tid int, at uint64) string {
	buf := make([]byte, unix.PathMax)
	mem, err := os.Open(fmt.Sprintf("/proc/%d/mem", tid))
	if err == nil {
		defer mem.Close()
		// It may end before the longest path would.
		n, _ := mem.ReadAt(buf, int64(at))
		buf = buf[:n]
	}
	path, _, _ := bytes.Cut(buf, []byte{0})
	name, ok := strings.CutPrefix(string(path), tr.dir+"/")
	if filepath.IsAbs(name) && !ok {
		return ""
	}
	return what + " " + name
}

func ptrace(request, tid int, addr, data uintptr) error {
	if _, _, errno := unix.Syscall6(unix.SYS_PTRACE, uintptr(request), uintptr(tid), addr, data, 0, 0); errno != 0 {
		return errno
	}
	return nil
}
