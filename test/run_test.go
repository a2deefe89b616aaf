// Running programs, and what the tests need of the machine.

package test

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// patience is how long anything may take before a test calls it hung. It is
// never waited for in a test that passes.
const patience = 60 * time.Second

// nobody is a user who may do nothing in particular.
var nobody = &syscall.Credential{Uid: 65534, Gid: 65534, NoSetGroups: false}

// result is how a program ended.
type result struct {
	stdout, stderr string
	status         int
}

// need fails the test, or skips it where CI is not true, unless all of the
// programs are installed.
func need(t *testing.T, programs ...string) {
	t.Helper()
	for _, p := range programs {
		if _, err := exec.LookPath(p); err != nil {
			lacking(t, p+" is not installed")
		}
	}
}

// needRoot is like need for what only root may do.
func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		lacking(t, "this needs root")
	}
	if _, err := os.Stat("/dev/fuse"); err != nil {
		lacking(t, err.Error())
	}
}

func lacking(t *testing.T, what string) {
	t.Helper()
	if os.Getenv("CI") == "true" {
		t.Fatal(what)
	}
	t.Skip(what)
}

// scratch returns an empty directory that every user may enter. It is removed
// when the test ends; a mount that is still in it fails the test, and is
// detached first, because removing files below it would destroy snapshots.
func scratch(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "blksnap-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		for _, m := range mountsBelow(t, dir) {
			t.Errorf("%s is still mounted at the end of the test", m)
			if err := unix.Unmount(m, unix.MNT_DETACH); err != nil {
				t.Fatalf("unmount %s: %v", m, err)
			}
		}
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

// mountsBelow lists the mount points at and below dir, the last mounted first.
func mountsBelow(t *testing.T, dir string) []string {
	t.Helper()
	table, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Fatal(err)
	}
	var mounts []string
	for line := range strings.Lines(string(table)) {
		if point := strings.Fields(line)[1]; strings.HasPrefix(point+"/", dir+"/") {
			mounts = append(mounts, point)
		}
	}
	slices.Reverse(mounts)
	return mounts
}

// end returns what a program wrote and its exit status, which is -1 if a
// signal ended it. The test fails if the program cannot be started or takes
// longer than patience.
func end(t *testing.T, cmd *exec.Cmd) result {
	t.Helper()
	return endWithin(t, patience, cmd)
}

// endWithin is end for programs that may take longer.
func endWithin(t *testing.T, limit time.Duration, cmd *exec.Cmd) result {
	t.Helper()
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL

	if err := cmd.Start(); err != nil {
		t.Fatalf("start %v: %v", cmd.Args, err)
	}
	overdue := time.AfterFunc(limit, func() { cmd.Process.Kill() })
	cmd.WaitDelay = time.Second
	err := cmd.Wait()
	if !overdue.Stop() {
		t.Fatalf("%v did not end within %v\nstdout: %s\nstderr: %s", cmd.Args, limit, &stdout, &stderr)
	}
	if exit := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exit) {
		t.Fatalf("wait for %v: %v", cmd.Args, err)
	}
	return result{stdout.String(), stderr.String(), cmd.ProcessState.ExitCode()}
}

// run returns what a program wrote to its standard output, without the last
// newline. The test fails if the program does.
func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	return succeed(t, exec.Command(name, args...))
}

// sh is run for a bash script, which finds args in $1, $2 and so on.
func sh(t *testing.T, script string, args ...string) string {
	t.Helper()
	return run(t, "bash", append([]string{"-euo", "pipefail", "-c", script, "bash"}, args...)...)
}

func succeed(t *testing.T, cmd *exec.Cmd) string {
	t.Helper()
	r := end(t, cmd)
	if r.status != 0 {
		t.Fatalf("%v: status %d\nstdout: %s\nstderr: %s", cmd.Args, r.status, r.stdout, r.stderr)
	}
	return strings.TrimSuffix(r.stdout, "\n")
}

// eventually waits until done returns true, for things that happen some time
// after what causes them: no message says when.
func eventually(t *testing.T, what string, done func() bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	for !done() {
		select {
		case <-ctx.Done():
			t.Fatalf("%s: not within %v", what, patience)
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// read returns the content of a file without its last newline.
func read(t *testing.T, path ...string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(path...))
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSuffix(string(b), "\n")
}

// readNumber returns the decimal number that a file holds.
func readNumber(t *testing.T, path string) int64 {
	t.Helper()
	n, err := strconv.ParseInt(read(t, path), 10, 64)
	if err != nil {
		t.Fatalf("%s: %v", path, err)
	}
	return n
}

// write makes a file of content, which replaces what was there.
func write(t *testing.T, path string, content []byte) {
	t.Helper()
	if err := os.WriteFile(path, content, 0o644); err != nil {
		t.Fatal(err)
	}
}

func mkdir(t *testing.T, path string) {
	t.Helper()
	if err := os.Mkdir(path, 0o755); err != nil {
		t.Fatal(err)
	}
}

func rmdir(t *testing.T, path string) {
	t.Helper()
	if err := syscall.Rmdir(path); err != nil {
		t.Fatalf("rmdir %s: %v", path, err)
	}
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return !errors.Is(err, fs.ErrNotExist)
}
