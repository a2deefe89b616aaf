// Bad input: one clear line, status 1 or 2, and nothing changed.

package test

import (
	"bufio"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// refusal is a blksnap serve that must not start.
type refusal struct {
	name   string
	args   []string // after serve; a flag here wins over those that the test sets
	status int
	want   string // in the one line on stderr
	user   *syscall.Credential
}

func TestServeRefuses(t *testing.T) {
	needRoot(t)
	need(t, "qemu-io")
	dir := scratch(t)
	good := makeOrigin(t, dir, "good", miB)
	in := func(name string) string { return filepath.Join(dir, name) }
	empty, odd, foreign, private := in("empty.img"), in("odd.img"), in("foreign"), in("private.img")
	write(t, empty, nil)
	write(t, odd, make([]byte, 1000))
	write(t, foreign, []byte("somebody's data"))
	write(t, private, make([]byte, miB))
	if err := os.Chmod(private, 0o600); err != nil {
		t.Fatal(err)
	}
	full := tmpfs(t, "size=64k")
	write(t, filepath.Join(full, "fill"), make([]byte, 64*kiB))
	notEmpty := in("notempty")
	mkdir(t, notEmpty)
	write(t, filepath.Join(notEmpty, "file"), nil)
	looped := makeOrigin(t, dir, "looped", miB)
	loop(t, looped, true)
	mounted := ext4Image(t, scratch(t), "mounted") // not in dir: the kernel writes to it
	dev := loop(t, mounted, false)
	mount(t, dev, "ext4", "rw")
	inQemu := heldByQemu(t, makeOrigin(t, dir, "inqemu", miB))
	other := serve(t, makeOrigin(t, dir, "taken", miB))
	taken := in("taken.img")

	for _, tc := range []refusal{
		{name: "origin missing", args: []string{in("none.img")}, status: 1, want: "none.img"},
		{name: "origin a directory", args: []string{dir}, status: 1, want: "directory"},
		{name: "origin empty", args: []string{empty}, status: 1, want: "empty"},
		{name: "origin not a multiple of 512", args: []string{odd}, status: 1, want: "512"},
		{name: "origin a character device", args: []string{"/dev/null"}, status: 1, want: "/dev/null"},
		{name: "origin behind a loop device", args: []string{looped}, status: 1, want: "loop"},
		{name: "origin mounted through loop", args: []string{mounted}, status: 1, want: "loop"},
		{name: "origin a mounted block device", args: []string{"vda=" + dev}, status: 1, want: "in use"},
		{name: "origin in use by QEMU", args: []string{inQemu}, status: 1, want: "in use"},
		{name: "origin of another blksnap", args: []string{taken}, status: 1, want: "locked"},
		{name: "origin without permission", args: []string{private}, status: 1, want: "permission denied", user: nobody},
		{name: "origin given twice", args: []string{"a=" + good, "b=" + good}, status: 1, want: "good.img"},
		{name: "two devices of one name", args: []string{"x=" + good, "x=" + odd}, status: 1, want: "x"},
		{name: "device name with a space", args: []string{"a b=" + good}, status: 1, want: "a b="},
		{name: "device name latest", args: []string{"latest=" + good}, status: 1, want: "latest"},
		{name: "no origin of that name form", args: []string{"=" + good}, status: 1, want: "="},
		{name: "tracking block not a power of two", args: []string{good, "--tracking-block", "100KiB"}, status: 1, want: "tracking block"},
		{name: "tracking block nonsense", args: []string{good, "--tracking-block", "big"}, status: 2, want: "tracking-block"},
		{name: "store limit zero", args: []string{good, "--store", "mem:0"}, status: 1, want: "mem:0"},
		{name: "store limit below a slot", args: []string{good, "--store", "mem:512"}, status: 1, want: "512"},
		{name: "store kind unknown", args: []string{good, "--store", "tape:/dev/st0"}, status: 1, want: "tape"},
		{name: "store without a path", args: []string{good, "--store", "file:"}, status: 1, want: "file:"},
		{name: "store in no directory", args: []string{good, "--store", "file:" + in("no/where")}, status: 1, want: "no/where"},
		{name: "store on a full disk", args: []string{good, "--store", "file:" + full + "/store:1MiB"}, status: 1, want: "no space"},
		{name: "store an origin", args: []string{good, "--store", "file:" + good}, status: 1, want: "good.img"},
		{name: "store of foreign data", args: []string{good, "--store", "file:" + foreign}, status: 1, want: "foreign"},
		{name: "mount point missing", args: []string{good, "--mount", in("nowhere")}, status: 1, want: "nowhere"},
		{name: "mount point not empty", args: []string{good, "--mount", notEmpty}, status: 1, want: "not empty"},
		{name: "mount point a file", args: []string{good, "--mount", foreign}, status: 1, want: "foreign"},
		{name: "mount point busy", args: []string{good, "--mount", other.mount}, status: 1, want: other.mount},
		{name: "run directory of another blksnap", args: []string{good, "--run", other.runDir}, status: 1, want: other.runDir},
		{name: "state directory of another blksnap", args: []string{good, "--state", other.state}, status: 1, want: other.state},
		{name: "listen address nonsense", args: []string{good, "--listen", "smoke://signals"}, status: 1, want: "smoke"},
		{name: "listen in no directory", args: []string{good, "--listen", "unix://" + in("no/where.sock")}, status: 1, want: "where.sock"},
		{name: "configuration missing", args: []string{good, "--config", in("none.yaml")}, status: 1, want: "none.yaml"},
		{name: "configuration nonsense", args: []string{good, "--config", foreign}, status: 1, want: "foreign"},
		{name: "no such flag", args: []string{good, "--faster"}, status: 2, want: "--faster"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			before := listing(t, dir)
			refuse(t, tc)
			if after := listing(t, dir); after != before {
				t.Errorf("files changed\n got %s\nwant %s", after, before)
			}
		})
	}
	other.blksnap("device", "show", "taken") // it was not disturbed
}

// refuse runs serve with directories of its own and checks that it ends as it
// should, leaving nothing mounted.
func refuse(t *testing.T, r refusal) {
	t.Helper()
	d := newDaemon(t, r.user)
	args := []string{"serve", "--mount", d.mount, "--run", d.runDir, "--state", d.state}
	for _, flag := range []string{"--mount", "--run", "--state"} {
		for i := range r.args {
			if r.args[i] == flag { // given once, by the case
				at := 1
				for args[at] != flag {
					at += 2
				}
				args = append(args[:at:at], args[at+2:]...)
			}
		}
	}
	cmd := d.command(append(args, r.args...)...)
	wantRefused(t, end(t, cmd), r.status, r.want)
	if left := mountsBelow(t, d.dir); len(left) != 0 {
		t.Errorf("%v is mounted", left)
	}
}

// wantRefused checks the exit status and the one line that says why.
func wantRefused(t *testing.T, r result, status int, want string) {
	t.Helper()
	if r.status != status {
		t.Errorf("status\n got %d\nwant %d", r.status, status)
	}
	if got := strings.Count(r.stderr, "\n"); got != 1 || !strings.HasSuffix(r.stderr, "\n") {
		t.Errorf("stderr has %d lines, want 1:\n%s", got, r.stderr)
	}
	if !strings.Contains(r.stderr, want) {
		t.Errorf("stderr\n got %swant it to mention %q", r.stderr, want)
	}
	if r.stdout != "" {
		t.Errorf("stdout is not empty: %s", r.stdout)
	}
}

func TestCommandsRefuse(t *testing.T) {
	needRoot(t)
	d, origin := serveOrigin(t, 4*miB)
	d.blksnap("snapshot", "create", "taken")
	open, err := os.Open(d.snapshot("taken", "vda.img"))
	if err != nil {
		t.Fatal(err)
	}
	defer open.Close()
	long := strings.Repeat("n", 65)

	for _, tc := range []struct {
		args   string
		status int
		want   string
	}{
		{"snapshot create taken", 1, "taken"},
		{"device resize nope", 1, "nope"},
		{"device resize vda --shrink 8MiB", 1, "shrink vda"},
		{"device resize vda --shrink 1000", 1, "shrink vda"},
		{"snapshot create latest", 1, "latest"},
		{"snapshot create .hidden", 1, ".hidden"},
		{"snapshot create a/b", 1, "a/b"},
		{"snapshot create a@b", 1, "a@b"},
		{"snapshot create " + long, 1, "nnn"},
		{"snapshot create s --device vdz", 1, "vdz"},
		{"snapshot create s --colour blue", 2, "colour"},
		{"snapshot show nightly", 1, "nightly"},
		{"snapshot destroy nightly", 1, "nightly"},
		{"snapshot destroy taken", 1, "taken"}, // its image is open
		{"snapshot destroy", 2, "name"},
		{"snapshot", 2, "create"},
		{"snapshot explode taken", 2, "explode"},
		{"device show vdz", 1, "vdz"},
		{"device remove vdz", 1, "vdz"},
		{"device remove vda", 1, "vda"}, // it has a snapshot
		{"device add " + origin, 1, "vda"},
		{"device add vdb=" + origin, 1, origin},
		{"device add vdb=/nowhere/vdb.img", 1, "/nowhere/vdb.img"},
		{"cbt show vdz", 1, "vdz"},
		{"cbt extents vdz --since 0", 1, "vdz"},
		{"cbt extents vda --since yesterday", 2, "yesterday"},
		{"cbt extents vda", 2, "since"},
		{"cbt extents vda --since 999999999", 3, "999999999"},
		{"cbt extents vda --since all --at nightly", 1, "nightly"},
		{"cbt extents vda --since all --generation 00000000-0000-0000-0000-000000000000", 3, "generation"},
		{"cbt mark vda --range 0:99999999999", 1, "99999999999"},
		{"cbt mark vda --range here:there", 2, "range"},
		{"cbt reset vdz", 1, "vdz"},
		{"frobnicate", 2, "frobnicate"},
		{"", 2, ""},
	} {
		t.Run(tc.args, func(t *testing.T) {
			wantRefused(t, d.try(strings.Fields(tc.args)...), tc.status, tc.want)
		})
	}
	mkdir(t, d.snapshot("free"))
	wantRefused(t, d.try("snapshot", "destroy", "taken", "free"), 1, "taken")
	if got, want := snapshots(t, d), "[latest taken]"; got != want {
		t.Errorf("snapshots after all that\n got %s\nwant %s", got, want)
	}

	t.Run("nobody behind the control socket", func(t *testing.T) {
		socket := filepath.Join(d.dir, "dead.sock")
		l, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"})
		if err != nil {
			t.Fatal(err)
		}
		l.SetUnlinkOnClose(false)
		l.Close()
		wantRefused(t, d.try("device", "list", "--control", socket), 1, socket)
		wantRefused(t, d.try("device", "list", "--control", socket+".none"), 1, socket)
	})
}

// The tree refuses by errno what the commands refuse by a line.
func TestTreeRefuses(t *testing.T) {
	needRoot(t)
	d, _ := serveOrigin(t, 4*miB)
	mkdir(t, d.snapshot("taken"))
	f, err := os.Open(d.snapshot("taken", "vda.img"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()

	for _, tc := range []struct {
		name string
		do   func() error
		want syscall.Errno
	}{
		{"take a name that is taken", func() error { return syscall.Mkdir(d.snapshot("taken"), 0o755) }, syscall.EEXIST},
		{"take latest", func() error { return syscall.Mkdir(d.snapshot("latest"), 0o755) }, syscall.EEXIST},
		{"take a bad name", func() error { return syscall.Mkdir(d.snapshot("-x"), 0o755) }, syscall.EINVAL},
		{"destroy what is open", func() error { return syscall.Rmdir(d.snapshot("taken")) }, syscall.EBUSY},
		{"destroy what is not there", func() error { return syscall.Rmdir(d.snapshot("none")) }, syscall.ENOENT},
		{"write an image", func() error {
			_, err := syscall.Open(d.snapshot("taken", "vda.img"), syscall.O_WRONLY, 0)
			return err
		}, syscall.EROFS},
		{"since a number too old", func() error { return unix.Access(d.snapshot("taken", "vda.cbt", "since", "999999999"), unix.F_OK) }, syscall.ENOENT},
		{"since no number", func() error { return unix.Access(d.snapshot("taken", "vda.cbt", "since", "01x"), unix.F_OK) }, syscall.ENOENT},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if got := tc.do(); got != tc.want {
				t.Errorf("\n got %v\nwant %v", got, tc.want)
			}
		})
	}
	for _, path := range []string{d.mount, d.device(), d.device("vda"), d.snapshot("taken")} {
		if err := os.WriteFile(filepath.Join(path, "file"), nil, 0o644); err == nil {
			t.Errorf("a file was made in %s", path)
		}
	}
	if got, want := snapshots(t, d), "[latest taken]"; got != want {
		t.Errorf("snapshots after all that\n got %s\nwant %s", got, want)
	}
}

// snapshots lists the tree's directory of snapshots.
func snapshots(t *testing.T, d *daemon) string {
	t.Helper()
	entries, err := os.ReadDir(d.snapshot())
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return fmt.Sprint(names)
}

// listing describes the files in dir so that a change shows.
func listing(t *testing.T, dir string) string {
	t.Helper()
	return sh(t, `cd "$1"; ls -l --time-style=full-iso; find . -maxdepth 1 -type f -exec md5sum {} +`, dir)
}

// tmpfs mounts one until the test ends.
func tmpfs(t *testing.T, options string) (point string) {
	t.Helper()
	return mount(t, "tmpfs", "tmpfs", options)
}

// ext4Image makes an ext4 file system in a file of its own.
func ext4Image(t *testing.T, dir, name string) (path string) {
	t.Helper()
	need(t, "mkfs.ext4")
	path = filepath.Join(dir, name+".img")
	write(t, path, nil)
	run(t, "mkfs.ext4", "-q", "-F", path, "4M")
	return path
}

// heldByQemu opens path as a running virtual machine does, until the test ends.
func heldByQemu(t *testing.T, path string) string {
	t.Helper()
	cmd := exec.Command("qemu-io", "-f", "raw", path)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	said := &log{}
	cmd.Stdout, cmd.Stderr = said, said
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		stdin.Close()
		overdue := time.AfterFunc(patience, func() { cmd.Process.Kill() })
		defer overdue.Stop()
		if err := cmd.Wait(); err != nil {
			t.Errorf("qemu-io: %v\n%s", err, said)
		}
	})
	if _, err := stdin.Write([]byte("length\n")); err != nil {
		t.Fatal(err)
	}
	eventually(t, "qemu-io has opened "+path, func() bool { return strings.Contains(said.String(), "1 MiB") })
	return path
}

// TestServeRefusesADeadDisk gives serve a run directory on a disk that does not answer: it
// says so, and ends as soon as the disk lets it.
func TestServeRefusesADeadDisk(t *testing.T) {
	needRoot(t)
	dir, answer := newDeadDir(t)
	dead := filepath.Join(dir, "below")
	d := newDaemon(t, nil)
	cmd := d.command("serve", "--mount", "none", "--run", dead, "--state", d.state, "--store", "mem:16MiB", makeOrigin(t, d.dir, "vda", miB))
	cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
	stderr, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(stderr).ReadString('\n')
	answer()
	if want := "run directory " + dead + ": it hangs"; err != nil || !strings.Contains(line, want) {
		t.Errorf("stderr\n got %q, %v\nwant it to mention %q", line, err, want)
	}
	if cmd.Wait(); cmd.ProcessState.ExitCode() != 1 {
		t.Errorf("it ended with %v, want status 1", cmd.ProcessState)
	}
}
