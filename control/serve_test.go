package control

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"blksnap/cow"
)

// testConfig returns a configuration that touches nothing outside the test's
// directories. Its tree is not mounted.
func testConfig(t *testing.T, origins ...string) Config {
	t.Helper()
	dir := t.TempDir()
	return Config{
		File:   writeConfig(t, ""),
		Origin: origins,
		Mount:  "none",
		Run:    filepath.Join(dir, "run"),
		State:  filepath.Join(dir, "state"),
		Store:  []string{"mem:8MiB"},
	}
}

// running is a daemon that serves in this process.
type running struct {
	words []string // what it said before it was ready
	stop  context.CancelFunc
	ended chan error // what Serve returned
}

// start runs Serve until it is ready, and stops it when the test ends.
func start(t *testing.T, c Config) *running {
	t.Helper()
	t.Cleanup(restoreProcess())
	ctx, cancel := context.WithCancel(t.Context())
	r := &running{stop: cancel, ended: make(chan error, 1)}
	out, in := io.Pipe()
	go func() {
		err := Serve(ctx, c, "0.0.0-test", in, io.Discard)
		in.Close()
		r.ended <- err
	}()
	t.Cleanup(func() {
		cancel()
		if err := <-r.ended; err != nil {
			t.Errorf("the daemon ended with: %v", err)
		}
		close(r.ended)
	})
	lines := bufio.NewScanner(out)
	for lines.Scan() {
		if lines.Text() == "ready" {
			return r
		}
		r.words = append(r.words, lines.Text())
	}
	t.Fatal("the daemon ended before it was ready")
	return nil
}

// restoreProcess returns a function that takes back what Serve does to the
// process.
func restoreProcess() func() {
	mask := syscall.Umask(0)
	syscall.Umask(mask)
	return func() { syscall.Umask(mask) }
}

// wait waits until the daemon has ended by itself.
func (r *running) wait(t *testing.T) {
	t.Helper()
	select {
	case err := <-r.ended:
		r.ended <- err
	case <-time.After(20 * time.Second):
		t.Fatal("the daemon goes on")
	}
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return !errors.Is(err, fs.ErrNotExist)
}

// TestServe starts a daemon with all it has and looks at every door, then stops
// it and looks whether all are gone.
func TestServe(t *testing.T) {
	c := testConfig(t, "vda="+makeOrigin(t, 1<<20), "vdb="+makeOrigin(t, 2<<20))
	mountConfig(t, &c)
	r := start(t, c)
	want := []string{
		"vda  1048576  nbd+unix:///vda?socket=" + c.Run + "/nbd.sock",
		"vdb  2097152  nbd+unix:///vdb?socket=" + c.Run + "/nbd.sock",
	}
	if diff := cmp.Diff(want, r.words); diff != "" {
		t.Errorf("words before ready, -want +got:\n%s", diff)
	}
	client := NewClient(c.Run + "/control.sock")
	if _, err := client.TakeSnapshot(t.Context(), SnapshotRequest{Name: "s"}); err != nil {
		t.Error(err)
	}
	if text, err := os.ReadFile(c.Mount + "/snapshots/s/state"); string(text) != "ok\n" || err != nil {
		t.Errorf("state of the snapshot in the tree\n got %q, %v\nwant ok", text, err)
	}
	conn, err := net.Dial("unix", c.Run+"/nbd.sock")
	if err != nil {
		t.Fatal(err)
	}
	hello := make([]byte, 8)
	if _, err := io.ReadFull(conn, hello); string(hello) != "NBDMAGIC" || err != nil {
		t.Errorf("first bytes of the NBD socket\n got %q, %v\nwant NBDMAGIC", hello, err)
	}
	conn.Close()
	for _, path := range []string{c.Run, c.State, c.Run + "/control.sock", c.Run + "/nbd.sock"} {
		if st, err := os.Stat(path); err != nil || st.Mode().Perm()&0o077 != 0 {
			t.Errorf("%s\n got %v, %v\nwant it closed to others", path, st.Mode(), err)
		}
	}

	made := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(made, nil, 0o666); err != nil {
		t.Fatal(err)
	}
	if st, err := os.Stat(made); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("file that the daemon makes\n got %v, %v\nwant it closed to others", st.Mode(), err)
	}
	followed := make(chan error, 1)
	follow, heard := client.Events(t.Context(), true), make(chan struct{}, keptEvents)
	go func() {
		var err error
		for _, err = range follow {
			heard <- struct{}{}
		}
		followed <- err
	}()
	<-heard
	r.stop()
	r.wait(t)
	if err := <-followed; err != nil {
		t.Errorf("events that were followed until the stop ended with: %v", err)
	}
	for _, path := range []string{c.Run + "/control.sock", c.Run + "/nbd.sock", c.Mount + "/version"} {
		if exists(path) {
			t.Errorf("%s is still there after the stop", path)
		}
	}
	for _, arg := range c.Origin {
		_, path, _ := strings.Cut(arg, "=")
		o, err := cow.OpenOrigin(path)
		if err != nil {
			t.Errorf("origin after the stop: %v", err)
			continue
		}
		o.Close()
	}
	start(t, c) // the locks are free
}

// mountConfig lets c mount a tree, or skips the test where that cannot be.
func mountConfig(t *testing.T, c *Config) {
	t.Helper()
	f, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0)
	if err != nil {
		lacking(t, err.Error())
	}
	f.Close()
	c.Mount = t.TempDir()
}

// lacking skips the test where CI is not true, and fails it where it is.
func lacking(t *testing.T, what string) {
	t.Helper()
	if os.Getenv("CI") == "true" {
		t.Fatal(what)
	}
	t.Skip(what)
}

// TestUmountStops unmounts the tree of a daemon from outside.
func TestUmountStops(t *testing.T) {
	c := testConfig(t, "vda="+makeOrigin(t, 1<<20))
	mountConfig(t, &c)
	if os.Geteuid() != 0 {
		lacking(t, "needs root")
	}
	r := start(t, c)
	if err := syscall.Unmount(c.Mount, 0); err != nil {
		t.Fatal(err)
	}
	r.wait(t)
	if exists(c.Run + "/control.sock") {
		t.Error("the control socket is still there")
	}
}

// TestServeIdle checks that a client which has gone silent is dropped where that is
// asked for.
func TestServeIdle(t *testing.T) {
	c := testConfig(t, "vda="+makeOrigin(t, 1<<20))
	c.Mount, c.IdleTimeout = "none", new(50*time.Millisecond)
	start(t, c)
	conn, err := net.Dial("unix", c.Run+"/nbd.sock")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(20 * time.Second))
	// Flags: fixed newstyle, no zeroes. NBD_OPT_EXPORT_NAME, of vda.
	if _, err := io.WriteString(conn, "\x00\x00\x00\x03IHAVEOPT\x00\x00\x00\x01\x00\x00\x00\x03vda"); err != nil {
		t.Fatal(err)
	}
	all, err := io.ReadAll(conn)
	if want := 18 + 10; len(all) != want || err != nil {
		t.Errorf("what a silent client gets\n got %d bytes, %v\nwant the greeting and the export, %d bytes, and the end", len(all), err, want)
	}
}

// TestServeRefuses starts daemons that must not start. Each must say why in a
// line and leave nothing that was not there.
func TestServeRefuses(t *testing.T) {
	t.Cleanup(restoreProcess())
	good := makeOrigin(t, 1<<20)
	other := start(t, testConfig(t, "vda="+makeOrigin(t, 1<<20)))
	_, used, _ := strings.Cut(other.words[0], "socket=")
	foreign := makeOrigin(t, 1<<20)
	if err := os.WriteFile(foreign, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name   string
		change func(c *Config)
		err    string // a pattern; RUN, STATE stand for the directories
	}{
		{"origin missing", func(c *Config) { c.Origin = []string{"/nonexistent/vda.img"} },
			"add device vda: origin /nonexistent/vda.img: no such file or directory"},
		{"second origin missing", func(c *Config) { c.Origin = []string{good, "/nonexistent/vdz.img"} },
			"add device vdz: origin /nonexistent/vdz.img: no such file or directory"},
		{"origin twice", func(c *Config) { c.Origin = []string{"a=" + good, "b=" + good} },
			"add device b: origin " + good + " is device a already"},
		{"run directory of another daemon", func(c *Config) { c.Run = filepath.Dir(used) },
			fmt.Sprintf("lock directory RUN: in use by another blksnap, process %d", os.Getpid())},
		{"state directory of another daemon", func(c *Config) { c.State = filepath.Join(filepath.Dir(used), "../state") },
			fmt.Sprintf("lock directory STATE: in use by another blksnap, process %d", os.Getpid())},
		{"NBD socket of another daemon", func(c *Config) { c.Listen = []string{"unix://" + used} },
			"listen on " + used + ": the socket is in use"},
		{"store that holds something else", func(c *Config) { c.Store = []string{"file:" + foreign} },
			"open snapstore " + foreign + ": not a snapstore"},
		{"second store of a bad size", func(c *Config) { c.Store = []string{"mem:1MiB", "file:STATE/s:0"} },
			`snapstore "file:STATE/s:0": limit 0 is too small`},
		{"mount point missing", func(c *Config) { c.Mount = "/nonexistent/mnt" },
			"mount point /nonexistent/mnt: no such file or directory$"},
		{"mount point not empty", func(c *Config) { c.Mount = filepath.Dir(good) },
			"mount point " + filepath.Dir(good) + ": directory not empty"},
		{"mount point is a file", func(c *Config) { c.Mount = good },
			"mount point.* " + good + ": not a directory"},
		{"run directory open to others", func(c *Config) {
			if err := errors.Join(os.Mkdir(c.Run, 0o700), os.Chmod(c.Run, 0o777)); err != nil {
				t.Fatal(err)
			}
		}, "directory RUN is open to the writes of others .mode 0777.$"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := testConfig(t, "vda="+good)
			c.Store = []string{"file:" + filepath.Join(c.State, "snapstore") + ":1MiB"}
			tc.change(&c)
			for i, s := range c.Store {
				c.Store[i] = strings.ReplaceAll(s, "STATE", c.State)
			}
			want := strings.NewReplacer("RUN", c.Run, "STATE", filepath.Clean(c.State)).Replace(tc.err)
			err := Serve(t.Context(), c, "0.0.0-test", io.Discard, io.Discard)
			if err == nil || !regexp.MustCompile("^"+want).MatchString(err.Error()) || strings.Contains(err.Error(), "\n") {
				t.Errorf("start\n got %v\nwant one line that begins: %s", err, want)
			}
			for _, left := range []string{"/control.sock", "/nbd.sock"} {
				if path := c.Run + left; c.Run != filepath.Dir(used) && exists(path) {
					t.Errorf("%s was left behind", path)
				}
			}
			if path := filepath.Join(c.State, "snapstore"); exists(path) {
				t.Errorf("%s was left behind", path)
			}
		})
	}
	if text, _ := os.ReadFile(foreign); string(text) != "precious" {
		t.Errorf("file that was no snapstore\n got %q\nwant it as it was", text)
	}
}

// TestWithin waits for what hangs, and for what does not.
func TestWithin(t *testing.T) {
	release := make(chan struct{})
	defer close(release)
	err := within(time.Millisecond, "close device vda", func() error { <-release; return nil })
	wantError(t, "what hangs", err, "close device vda: it hangs, left to the end of the process")
	err = within(time.Hour, "close device vda", func() error { return io.ErrClosedPipe })
	if !errors.Is(err, io.ErrClosedPipe) {
		t.Errorf("what ends\n got %v\nwant %v", err, io.ErrClosedPipe)
	}
}

// TestLockOfWhatHangs ends a daemon with and without something that hangs, and looks
// whether another could start.
func TestLockOfWhatHangs(t *testing.T) {
	release := make(chan struct{})
	defer close(release)
	for _, tc := range []struct {
		name  string
		limit time.Duration
		close func() error
		want  string
	}{
		{"closes", time.Minute, func() error { return nil }, "<nil>"},
		{"fails", time.Minute, func() error { return io.ErrClosedPipe }, "<nil>"},
		{"hangs", time.Millisecond, func() error { <-release; return nil },
			fmt.Sprintf("lock directory RUN: in use by another blksnap, process %d", os.Getpid())},
	} {
		t.Run(tc.name, func(t *testing.T) {
			dir := t.TempDir()
			s := &service{set: settings{run: dir, state: dir, control: filepath.Join(dir, "control.sock")}}
			if err := s.lock(t.Context()); err != nil {
				t.Fatal(err)
			}
			s.later(func() error { return within(tc.limit, "close device vda", tc.close) })
			s.close()
			l, err := lockDir(t.Context(), dir, s.set.control, 0)
			wantError(t, "lock afterwards", err, strings.ReplaceAll(tc.want, "RUN", dir))
			if err == nil {
				l.unlock()
			}
		})
	}
}

// TestNotify plays the service manager.
func TestNotify(t *testing.T) {
	path := filepath.Join(t.TempDir(), "notify")
	l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Net: "unixgram", Name: path})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	t.Setenv("NOTIFY_SOCKET", path)
	t.Setenv("WATCHDOG_USEC", "20000")
	t.Setenv("WATCHDOG_PID", strconv.Itoa(os.Getpid()))
	next := func() string {
		buf := make([]byte, 1024)
		n, err := l.Read(buf)
		if err != nil {
			t.Fatal(err)
		}
		return string(buf[:n])
	}
	r := start(t, testConfig(t))
	var got []string
	for len(got) < 2 {
		got = append(got, next())
	}
	r.stop()
	for got[len(got)-1] != "STOPPING=1" {
		got = append(got, next())
	}
	last := len(got) - 1
	if got[0] != "READY=1" || got[1] != "WATCHDOG=1" || got[last] != "STOPPING=1" {
		t.Errorf("messages\n got %q\nwant READY=1, WATCHDOG=1 ..., STOPPING=1", got)
	}
}
