// A blksnap daemon with directories of its own.

package test

import (
	"bufio"
	"bytes"
	"encoding/json"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// daemon is a blksnap serve process that can be stopped, killed and started
// again over the same directories.
type daemon struct {
	t    *testing.T
	path string              // of the program
	dir  string              // holds everything below, and what the test puts there
	user *syscall.Credential // nil: the user who runs the tests

	mount, runDir, state string
	env                  []string // of the daemon and of commands to it

	stdin  *os.File // of the next process; nil for none
	bootID string   // file with the boot id of the next one after a reboot; empty for none

	cmd    *exec.Cmd
	stderr *log
	before *log          // what the process before that wrote
	uris   []string      // the lines that it printed before "ready"
	ended  chan struct{} // closed when cmd has ended
	mayEnd bool          // the test has done what makes it end
}

// newDaemon makes the directories of a daemon that is not running yet, for
// user, or for the user of the tests where that is nil. Whatever is left of it
// at the end of the test is taken away.
func newDaemon(t *testing.T, user *syscall.Credential) *daemon {
	t.Helper()
	dir := scratch(t)
	d := &daemon{
		t: t, path: blksnapPath, dir: dir, user: user,
		mount:  filepath.Join(dir, "mnt"),
		runDir: filepath.Join(dir, "run"),
		state:  filepath.Join(dir, "state"),
	}
	d.env = append(os.Environ(), "BLKSNAP_CONTROL="+filepath.Join(d.runDir, "control.sock"))
	mkdir(t, d.mount)
	if user != nil {
		for _, owned := range []string{dir, d.mount} {
			if err := os.Chown(owned, int(user.Uid), int(user.Gid)); err != nil {
				t.Fatal(err)
			}
		}
	}
	t.Cleanup(d.clear)
	return d
}

// serve starts a daemon with the arguments of blksnap serve and returns when
// it is ready.
func serve(t *testing.T, args ...string) *daemon {
	t.Helper()
	d := newDaemon(t, nil)
	d.start(args...)
	return d
}

// start returns when the daemon is ready, and fails the test if it does not
// become so.
func (d *daemon) start(args ...string) {
	d.t.Helper()
	d.startPlain(append([]string{"--mount", d.mount, "--run", d.runDir, "--state", d.state}, args...)...)
}

// startPlain is start without the flags that name the directories.
func (d *daemon) startPlain(args ...string) {
	d.t.Helper()
	d.awaitReady(d.launchPlain(args...))
}

// launch starts the daemon and does not wait until it is ready.
func (d *daemon) launch(args ...string) {
	d.t.Helper()
	stdout := d.launchPlain(append([]string{"--mount", d.mount, "--run", d.runDir, "--state", d.state}, args...)...)
	go drain(stdout)
}

// launchPlain starts the daemon and returns what it prints.
func (d *daemon) launchPlain(args ...string) (stdout *os.File) {
	d.t.Helper()
	d.cmd = d.command(append([]string{"serve"}, args...)...)
	if d.bootID != "" {
		d.cmd.Env = append(slices.Clone(d.cmd.Env), rebooting+"="+d.bootID)
		d.cmd.Args = slices.Insert(d.cmd.Args, 0, "rebooted")
		d.cmd.Path = "/proc/self/exe"
	}
	d.cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
	d.before, d.stderr, d.uris, d.ended, d.mayEnd = d.stderr, &log{}, nil, make(chan struct{}), false
	d.cmd.Stderr = d.stderr
	if d.stdin != nil {
		d.cmd.Stdin = d.stdin
	}
	stdout, stdoutEnd, err := os.Pipe()
	if err != nil {
		d.t.Fatal(err)
	}
	d.cmd.Stdout = stdoutEnd
	if err := d.cmd.Start(); err != nil {
		d.t.Fatal(err)
	}
	stdoutEnd.Close()
	go func(cmd *exec.Cmd, ended chan struct{}) {
		cmd.Wait()
		close(ended)
	}(d.cmd, d.ended)
	return stdout
}

// drain reads what nobody wants to know, so that who prints it is not blocked.
func drain(stdout *os.File) {
	io.Copy(io.Discard, stdout)
	stdout.Close()
}

// awaitReady returns when the daemon has printed that it is ready, and fails the
// test if it ends before.
func (d *daemon) awaitReady(stdout *os.File) {
	d.t.Helper()
	overdue := time.AfterFunc(patience, func() { d.cmd.Process.Kill() })
	defer overdue.Stop()
	lines := bufio.NewScanner(stdout)
	for lines.Scan() {
		if lines.Text() == "ready" {
			go drain(stdout)
			return
		}
		d.uris = append(d.uris, lines.Text())
	}
	stdout.Close()
	<-d.ended
	d.t.Fatalf("%v ended before it was ready: %v\n%s", d.cmd.Args, d.cmd.ProcessState, d.stderr)
}

// command is blksnap with args, as the daemon's user.
func (d *daemon) command(args ...string) *exec.Cmd {
	cmd := exec.Command(d.path, args...)
	cmd.Dir, cmd.Env = d.dir, d.env
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: d.user}
	return cmd
}

// try runs a blksnap command against the daemon.
func (d *daemon) try(args ...string) result {
	d.t.Helper()
	return end(d.t, d.command(args...))
}

// blksnap is try for a command that must succeed; it returns what the command
// printed, without the last newline.
func (d *daemon) blksnap(args ...string) string {
	d.t.Helper()
	r := d.try(args...)
	if r.status != 0 {
		d.t.Fatalf("blksnap %v: status %d: %s", args, r.status, r.stderr)
	}
	return strings.TrimSuffix(r.stdout, "\n")
}

// json is blksnap for a command that prints one object a line.
func (d *daemon) json(args ...string) []map[string]any {
	d.t.Helper()
	var objects []map[string]any
	for line := range strings.Lines(d.blksnap(append(args, "--json")...)) {
		var o map[string]any
		if err := json.Unmarshal([]byte(line), &o); err != nil {
			d.t.Fatalf("blksnap %v --json printed %q: %v", args, line, err)
		}
		objects = append(objects, o)
	}
	return objects
}

// uri is the NBD URI of an export.
func (d *daemon) uri(export string) string {
	return "nbd+unix:///" + export + "?socket=" + d.socket()
}

func (d *daemon) socket() string { return filepath.Join(d.runDir, "nbd.sock") }

// device and snapshot are paths in the tree.
func (d *daemon) device(elem ...string) string {
	return filepath.Join(append([]string{d.mount, "devices"}, elem...)...)
}

func (d *daemon) snapshot(elem ...string) string {
	return filepath.Join(append([]string{d.mount, "snapshots"}, elem...)...)
}

// stop ends the daemon as an administrator does, and fails the test unless it
// ends with status 0 and unmounts its tree.
func (d *daemon) stop() {
	d.t.Helper()
	d.signal(syscall.SIGTERM)
	if got := d.cmd.ProcessState.ExitCode(); got != 0 {
		d.t.Errorf("after SIGTERM the daemon ended with %v, want status 0", d.cmd.ProcessState)
	}
	if left := mountsBelow(d.t, d.dir); len(left) != 0 {
		d.t.Errorf("the stopped daemon left %v mounted", left)
	}
}

// kill ends the daemon without giving it a chance to do anything.
func (d *daemon) kill() {
	d.t.Helper()
	d.signal(syscall.SIGKILL)
}

// signal returns when the process has ended.
func (d *daemon) signal(sig syscall.Signal) {
	d.t.Helper()
	d.cmd.Process.Signal(sig)
	d.waitForEnd()
}

// waitForEnd returns when the process has ended by what the test did.
func (d *daemon) waitForEnd() {
	d.t.Helper()
	d.mayEnd = true
	select {
	case <-d.ended:
	case <-time.After(patience):
		d.cmd.Process.Kill()
		unix.Unmount(d.mount, unix.MNT_FORCE) // a thread of it may wait for an answer of its own
		<-d.ended
		d.t.Errorf("the daemon did not end within %v\n%s", patience, d.stderr)
	}
}

func (d *daemon) running() bool {
	if d.cmd == nil {
		return false
	}
	select {
	case <-d.ended:
		return false
	default:
		return true
	}
}

// clear stops the daemon if it runs, checks what it said, and takes away the
// mount of one that was killed.
func (d *daemon) clear() {
	if d.cmd == nil {
		return
	}
	if d.running() {
		d.stop()
	} else if !d.mayEnd {
		d.t.Errorf("the daemon ended by itself: %v", d.cmd.ProcessState)
	}
	if strings.Contains(d.stderr.String(), "WARNING: DATA RACE") {
		d.t.Error("the race detector found a race in the daemon")
	}
	if d.t.Failed() {
		if d.before != nil {
			d.t.Logf("what the daemon before wrote:\n%s", d.before)
		}
		d.t.Logf("what the daemon wrote:\n%s", d.stderr)
	}
	for unix.Unmount(d.mount, unix.MNT_DETACH) == nil {
	}
}

// log is what a process writes, readable while it runs.
type log struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *log) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *log) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}
