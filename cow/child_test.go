package cow

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// need fails the test, or skips it where CI is not true, unless all of the tools
// are installed.
func need(t *testing.T, tools ...string) {
	t.Helper()
	for _, tool := range tools {
		if _, err := exec.LookPath(tool); err != nil {
			lacking(t, tool+" is not installed")
		}
	}
}

func needRoot(t *testing.T) {
	t.Helper()
	if os.Getuid() != 0 {
		lacking(t, "not root")
	}
}

func lacking(t *testing.T, what string) {
	t.Helper()
	if os.Getenv("CI") == "true" {
		t.Fatal(what)
	}
	t.Skip(what)
}

// children are what child processes of tests do. Each holds what it has until its
// input ends.
var children = map[string]func(args []string) error{
	"lock": func(args []string) error { // a file, for one or for many
		f, err := os.OpenFile(args[0], os.O_RDWR, 0)
		if err != nil {
			return err
		}
		how := unix.LOCK_EX
		if args[1] == "shared" {
			how = unix.LOCK_SH
		}
		return unix.Flock(int(f.Fd()), how)
	},
	"byte": func(args []string) error { // of a file, as QEMU locks it
		f, err := os.OpenFile(args[0], os.O_RDWR, 0)
		if err != nil {
			return err
		}
		at, err := strconv.ParseInt(args[1], 10, 64)
		if err != nil {
			return err
		}
		return unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_RDLCK, Start: at, Len: 1})
	},
	"hold": func(args []string) error { // an origin
		_, err := OpenOrigin(args[0])
		return err
	},
	"nobody": func(args []string) error { // opens an origin
		if err := errors.Join(syscall.Setgroups(nil), syscall.Setgid(65534), syscall.Setuid(65534)); err != nil {
			return err
		}
		_, err := OpenOrigin(args[0])
		fmt.Println(err)
		return nil
	},
	"mount": func(args []string) error { // a device, where nobody else sees it
		if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
			return err
		}
		return unix.Mount(args[0], args[1], "ext4", 0, "")
	},
	"unmount": func(args []string) error { return unix.Unmount(args[1], 0) },
}

// TestChild is no test: it is what start runs.
func TestChild(t *testing.T) {
	what, args, ok := strings.Cut(os.Getenv("COW_TEST_DO"), "\n")
	if !ok {
		return
	}
	if err := children[what](strings.Split(args, "\n")); err != nil {
		t.Fatal(err)
	}
	fmt.Println("done")
	io.Copy(io.Discard, os.Stdin)
	if undo := children["un"+what]; undo != nil { // what the kernel would do later
		if err := undo(strings.Split(args, "\n")); err != nil {
			t.Error(err)
		}
	}
}

// start starts a child and returns what it said, when it is done. It dies with the
// test, or when end is called; what it holds goes with it.
func start(t *testing.T, what string, args ...string) (said []string, end func()) {
	t.Helper()
	c := exec.Command(os.Args[0], "-test.run=^TestChild$")
	c.Env = append(os.Environ(), "COW_TEST_DO="+what+"\n"+strings.Join(args, "\n"),
		"GORACE=atexit_sleep_ms=0")
	c.Stderr = os.Stderr
	c.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if what == "mount" {
		c.SysProcAttr.Unshareflags = syscall.CLONE_NEWNS
	}
	out, end := startPiped(t, c)
	lines := bufio.NewScanner(out)
	for lines.Scan() {
		if lines.Text() == "done" {
			return said, end
		}
		said = append(said, lines.Text())
	}
	t.Fatalf("%s %v ended with %q", what, args, said)
	return nil, nil
}

// startPiped starts c and returns what it prints. It ends, when its input does, with the
// test, or when end is called.
func startPiped(t *testing.T, c *exec.Cmd) (out io.Reader, end func()) {
	t.Helper()
	in, err := c.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err = c.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	end = sync.OnceFunc(func() {
		in.Close()
		c.Wait()
	})
	t.Cleanup(end)
	return out, end
}
