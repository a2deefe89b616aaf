package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// beMain in the environment makes the test binary behave as blksnap.
const beMain = "BLKSNAP_TEST_BE_MAIN"

func TestMain(m *testing.M) {
	if os.Getenv(beMain) != "" {
		main()
	}
	os.Exit(m.Run())
}

// blksnap returns a command that runs the program. It is killed after a minute.
func blksnap(t *testing.T, args ...string) *exec.Cmd {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	t.Cleanup(cancel)
	cmd := exec.CommandContext(ctx, "/proc/self/exe", args...)
	// The race detector would sleep for a second at each exit.
	cmd.Env = append(os.Environ(), beMain+"=1", "GORACE=atexit_sleep_ms=0")
	return cmd
}

// status runs cmd and returns its exit status and what it printed.
func status(t *testing.T, cmd *exec.Cmd) (status int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	if exit := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return cmd.ProcessState.ExitCode(), out.String(), errs.String()
}

// TestManual looks for every command and flag in the manual page.
func TestManual(t *testing.T) {
	page, err := os.ReadFile("docs/blksnap.8")
	if err != nil {
		t.Fatal(err)
	}
	manual := strings.ReplaceAll(string(page), `\-`, "-")
	k, err := newParser(&cli{}, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	for _, cmd := range k.Model.Leaves(true) {
		words := []string{".SS blksnap " + strings.TrimPrefix(cmd.Path(), "blksnap ")}
		for _, f := range cmd.Flags {
			words = append(words, "--"+f.Name)
		}
		for _, w := range words {
			if !strings.Contains(manual, w) {
				t.Errorf("the manual does not mention %q", w)
			}
		}
	}
}

// TestManualRenders lets the formatter look for mistakes.
func TestManualRenders(t *testing.T) {
	cmd := exec.CommandContext(t.Context(), "groff", "-man", "-ww", "-Tutf8", "-k", "-z", "docs/blksnap.8")
	out, err := cmd.CombinedOutput()
	if errors.Is(err, exec.ErrNotFound) && os.Getenv("CI") != "true" {
		t.Skip("needs groff")
	}
	if err != nil || len(out) > 0 {
		t.Errorf("groff says %v:\n%s", err, out)
	}
}

func TestExitStatus(t *testing.T) {
	none := filepath.Join(t.TempDir(), "none.sock")
	for _, tc := range []struct {
		name   string
		args   []string
		status int
		stderr string
	}{
		{"version", []string{"version"}, 0, ""},
		{"help", []string{"--help"}, 0, ""},
		{"nothing", nil, 2, `blksnap: expected one of "serve", "device", "snapshot", "cbt", "store", ...`},
		{"unknown command", []string{"frobnicate"}, 2, "blksnap: unexpected argument frobnicate"},
		{"unknown flag", []string{"device", "list", "--frob"}, 2, "blksnap: unknown flag --frob"},
		{"missing argument", []string{"device", "show"}, 2, `blksnap: expected "<name>"`},
		{"missing flag", []string{"cbt", "extents", "vda"}, 2, "blksnap: missing flags: --since=NUM|all"},
		{"two names", []string{"snapshot", "create", "a", "--name", "b"}, 2, "blksnap: snapshot create: NAME and --name are both given"},
		{"no time to live", []string{"snapshot", "create", "--ttl", "0"}, 2, "blksnap: snapshot create: --ttl must be more than 0"},
		{"no space", []string{"snapshot", "create", "--max-store", "0"}, 2, "blksnap: snapshot create: --max-store must be more than 0"},
		{"no size", []string{"device", "resize", "vda", "--shrink", "0"}, 2, "blksnap: device resize: --shrink must be more than 0"},
		{"empty mount point", []string{"snapshot", "create", "--freeze", ""}, 2, "blksnap: snapshot create: MOUNTPOINT of --freeze is empty"},
		{"empty name", []string{"snapshot", "create", ""}, 2, "blksnap: snapshot create: NAME is empty"},
		{"bad size", []string{"serve", "--tracking-block", "lots"}, 2, `blksnap: --tracking-block: "lots" is not a size such as 512, 64KiB, 10GiB or 1TiB`},
		{"bad range", []string{"cbt", "mark", "vda", "--range", "5"}, 2, `blksnap: --range: range "5" is not OFFSET:LENGTH`},
		{"bad number", []string{"cbt", "extents", "vda", "--since", "yesterday"}, 2, `blksnap: --since: since "yesterday" is neither a snapshot's number nor all`},
		{"no daemon", []string{"device", "list", "--control", none}, 1, "blksnap: no daemon answers on " + none + ": no such file or directory"},
		{"no daemon to ask for its version", []string{"version", "--control", none}, 1, "blksnap: no daemon answers on " + none + ": no such file or directory"},
		{"bad origin", []string{"serve", "--mount", "none", "--run", t.TempDir(), "--state", t.TempDir(), "--store", "mem:1MiB", "/nonexistent/a.img"}, 1,
			"blksnap: add device a: origin /nonexistent/a.img: no such file or directory"},
		{"mount without an origin", []string{"blksnap", t.TempDir(), "-o", "rw,origin="}, 1, "blksnap: mount option origin is empty: write origin=[NAME=]PATH"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got, _, stderr := status(t, blksnap(t, tc.args...))
			if want := strings.TrimSpace(tc.stderr + "\n"); got != tc.status || strings.TrimSuffix(stderr, "\n") != want {
				t.Errorf("blksnap %s\n got status %d, %q\nwant status %d, %q", strings.Join(tc.args, " "), got, stderr, tc.status, want)
			}
		})
	}
}

// place is where a daemon of a test lives.
type place struct{ run, state, mount, origin string }

func newPlace(t *testing.T) place {
	t.Helper()
	dir := t.TempDir()
	p := place{dir + "/run", dir + "/state", dir + "/mnt", dir + "/vda.img"}
	if err := os.WriteFile(p.origin, bytes.Repeat([]byte{7}, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	return p
}

func (p place) serve(args ...string) []string {
	return append([]string{"serve", "--run", p.run, "--state", p.state, "--store", "mem:1MiB"}, args...)
}

// ask runs a client command that must succeed and returns what it prints.
func (p place) ask(t *testing.T, args ...string) string {
	t.Helper()
	code, out, stderr := status(t, blksnap(t, append(args, "--control", p.run+"/control.sock")...))
	if code != 0 {
		t.Errorf("blksnap %s\n got status %d, %s", strings.Join(args, " "), code, stderr)
	}
	return out
}

// startServe starts a daemon and waits until it is ready. It is told to stop
// when the test ends, and must do so cleanly.
func startServe(t *testing.T, cmd *exec.Cmd, words io.Reader, what string) {
	t.Helper()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Signal(syscall.SIGTERM)
		if err := cmd.Wait(); err != nil {
			t.Errorf("%s ended with: %v", what, err)
		}
	})
	lines := bufio.NewScanner(words)
	for lines.Scan() {
		if lines.Text() == "ready" {
			return
		}
	}
	t.Fatalf("%s is not ready", what)
}

// TestCommands runs the program as a user does.
func TestCommands(t *testing.T) {
	p := newPlace(t)
	cmd := blksnap(t, p.serve("--mount", "none", "--tracking-block", "4KiB", p.origin)...)
	words, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	startServe(t, cmd, words, "the daemon")
	if got, want := p.ask(t, "snapshot", "create", "--name", "a"), "a\n"; got != want {
		t.Errorf("snapshot create\n got %q\nwant %q", got, want)
	}
	number := strings.Fields(p.ask(t, "cbt", "show", "vda"))[5]
	p.ask(t, "cbt", "mark", "vda", "--range", "8KiB:1")
	if got, want := p.ask(t, "cbt", "extents", "vda", "--since", number), "8192 4096 data\n"; got != want {
		t.Errorf("cbt extents\n got %q\nwant %q", got, want)
	}
	if got := p.ask(t, "device", "list", "--json"); !strings.HasPrefix(got, `{"name":"vda","origin":"`+p.origin+`","size":1048576,`) {
		t.Errorf("device list --json\n got %s", got)
	}
	code, _, stderr := status(t, blksnap(t, "cbt", "extents", "vda", "--since", "1", "--control", p.run+"/control.sock"))
	if code != 3 || !strings.Contains(stderr, "a full read is due") {
		t.Errorf("cbt extents of an unknown number\n got status %d, %q\nwant 3", code, stderr)
	}
	code, out, stderr := status(t, blksnap(t, p.serve("--mount", "none", p.origin)...))
	if code != 1 || out != "" || !strings.Contains(stderr, "in use by another blksnap") || strings.Count(stderr, "\n") != 1 {
		t.Errorf("a second daemon\n got status %d, %q, %q\nwant 1 and a line on stderr", code, out, stderr)
	}
	p.ask(t, "snapshot", "destroy", "a")
	p.ask(t, "device", "remove", "vda")
	if got := p.ask(t, "device", "list"); got != "" {
		t.Errorf("device list at the end\n got %q\nwant nothing", got)
	}
}

// TestRepeatedFlags serves two devices with a snapstore of two parts.
func TestRepeatedFlags(t *testing.T) {
	p, q := newPlace(t), newPlace(t)
	cmd := blksnap(t, p.serve("--mount", "none", "--store", "mem:2MiB", "a="+p.origin, "b="+q.origin)...)
	words, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	startServe(t, cmd, words, "the daemon")
	if got := strings.Count(p.ask(t, "device", "list", "--json"), "\n"); got != 2 {
		t.Errorf("devices\n got %d\nwant 2", got)
	}
	if got := strings.Count(p.ask(t, "store", "list", "--json"), "\n"); got != 2 {
		t.Errorf("parts of the snapstore\n got %d\nwant 2", got)
	}
}

// TestPassedSocket passes a listening socket in, as systemd and libnbd do.
func TestPassedSocket(t *testing.T) {
	p := newPlace(t)
	path := filepath.Join(t.TempDir(), "passed.sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	f, err := l.(*net.UnixListener).File()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	tmp := t.TempDir()
	cmd := blksnap(t)
	cmd.Path, cmd.Args = "/bin/sh", []string{"sh", "-c", `LISTEN_PID=$$ exec ` + self(t) + ` serve --mount none "$1"`, "sh", p.origin}
	cmd.Env = append(cmd.Env, "LISTEN_FDS=1", "TMPDIR="+tmp, "NOTIFY_SOCKET=")
	cmd.ExtraFiles = []*os.File{f}
	words, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { // after the daemon has ended
		if left, _ := filepath.Glob(tmp + "/*"); len(left) > 0 {
			t.Errorf("left in the temporary directory: %q", left)
		}
	})
	startServe(t, cmd, words, "the daemon")
	conn, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	hello := make([]byte, 8)
	if _, err := io.ReadFull(conn, hello); string(hello) != "NBDMAGIC" {
		t.Errorf("first bytes of the passed socket\n got %q, %v\nwant NBDMAGIC", hello, err)
	}
}

func self(t *testing.T) string {
	t.Helper()
	path, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// TestMount mounts as mount.fuse3 does and unmounts again.
func TestMount(t *testing.T) {
	if f, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0); err == nil {
		f.Close()
	} else if os.Getenv("CI") == "true" || os.Geteuid() == 0 {
		t.Fatal(err)
	} else {
		t.Skip(err)
	}
	p := newPlace(t)
	options := "rw,origin=vda=" + p.origin + ",store=mem:1MiB,run=" + p.run + ",state=" + p.state + ",dev,suid"
	// Whatever mount has open ends with it, and not with the daemon.
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	mount := blksnap(t, "blksnap", p.mount, "-o", options)
	mount.ExtraFiles = []*os.File{w}
	code, out, stderr := status(t, mount)
	if code != 0 || out != "" || stderr != "" {
		t.Fatalf("mount\n got status %d, %q, %q\nwant 0 and no word", code, out, stderr)
	}
	w.Close()
	if err := r.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if n, err := r.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("a pipe that mount had open\n got %d, %v\nwant %v", n, err, io.EOF)
	}
	text, err := os.ReadFile(p.run + "/lock")
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.Fields(string(text))[0])
	if err != nil {
		t.Fatal(err)
	}
	// The daemon is no child of ours: this is how to wait for its end.
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0)
		unix.Unmount(p.mount, unix.MNT_DETACH)
		unix.Close(fd)
	})
	if err := os.Mkdir(p.mount+"/snapshots/s", 0o700); err != nil {
		t.Error(err)
	}
	image, err := os.ReadFile(p.mount + "/snapshots/s/vda.img")
	if !bytes.Equal(image, bytes.Repeat([]byte{7}, 1<<20)) || err != nil {
		t.Errorf("image in the tree: %d bytes, %v\nwant the origin's content", len(image), err)
	}
	code, _, stderr = status(t, blksnap(t, "blksnap", p.mount, "-o", options))
	if code != 1 || !strings.Contains(stderr, "in use by another blksnap, process "+strconv.Itoa(pid)) || strings.Count(stderr, "\n") != 1 {
		t.Errorf("mount of what is mounted\n got status %d, %q\nwant 1 and a line", code, stderr)
	}
	unmount := func() error { return unix.Unmount(p.mount, 0) }
	if os.Geteuid() != 0 {
		unmount = func() error { return exec.Command("fusermount3", "-u", p.mount).Run() }
	}
	if err := unmount(); err != nil {
		t.Fatal(err)
	}
	poll := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	if n, err := unix.Poll(poll, 20_000); n != 1 {
		t.Errorf("the daemon goes on after umount: %d, %v", n, err)
	}
	if _, err := os.Stat(p.run + "/control.sock"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("control socket after umount\n got %v\nwant it gone", err)
	}
}

// TestMountRefused mounts what cannot be served: the reason must come through.
func TestMountRefused(t *testing.T) {
	p := newPlace(t)
	for _, tc := range []struct{ name, options, want string }{
		{"no origin", "origin=vda=/nonexistent/x", "blksnap: add device vda: origin /nonexistent/x: no such file or directory\n"},
		{"unknown option", "orign=/srv/vda.img", "blksnap: unknown flag --orign\n"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			code, _, stderr := status(t, blksnap(t, "blksnap", p.mount, "-o", "store=mem:1MiB,run="+p.run+",state="+p.state+","+tc.options))
			if code == 0 || stderr != tc.want {
				t.Errorf("mount -o %s\n got status %d, %q\nwant %q", tc.options, code, stderr, tc.want)
			}
		})
	}
}
