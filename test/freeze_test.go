// What goes around the instant of a snapshot: frozen file systems, commands, and
// the end of a snapshot's time.

package test

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// isFrozen says whether a write to the file system at point waits. It leaves a
// process behind that ends when the file system is thawed.
func isFrozen(t *testing.T, point string) bool {
	t.Helper()
	done := make(chan error, 1)
	go func() { done <- os.WriteFile(filepath.Join(point, "probe"), []byte("x"), 0o600) }()
	select {
	case err := <-done:
		if err != nil {
			t.Fatal(err)
		}
		return false
	case <-time.After(200 * time.Millisecond):
		t.Cleanup(func() { <-done })
		return true
	}
}

// thawAtEnd sees to it that a failing test leaves nothing frozen behind.
func thawAtEnd(t *testing.T, point string) {
	t.Helper()
	f, err := os.Open(point)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		const fiThaw = 0xC0045878 // FITHAW of linux/fs.h
		unix.IoctlSetInt(int(f.Fd()), fiThaw, 0)
		f.Close()
	})
}

func TestFreeze(t *testing.T) {
	needRoot(t)
	d, _ := serveOrigin(t, 64*miB)
	dev := attach(t, d, "vda")
	run(t, "mkfs.ext4", "-q", "-F", dev)
	point := mount(t, dev, "ext4", "")
	thawAtEnd(t, point)
	write(t, filepath.Join(point, "file"), []byte("content"))
	d.blksnap("snapshot", "create", "clean", "--freeze", point)
	check := filepath.Join(scratch(t), "check.img")
	run(t, "cp", d.snapshot("clean", "vda.img"), check)
	run(t, "e2fsck", "-fn", check)
	if isFrozen(t, point) {
		t.Error("the file system is still frozen")
	}
	inside := filepath.Join(point, "inside")
	mkdir(t, inside)
	for _, tc := range []struct{ name, point, want string }{
		{"the file system of the origin", d.dir, "its file system holds the origin of device vda"},
		{"what cannot be frozen", "/proc", "operation not supported"},
		{"what is not there", "/nonexistent", "no such file or directory"},
		{"what is not mounted", inside, "no file system is mounted there"},
	} {
		r := d.try("snapshot", "create", "no", "--freeze", tc.point)
		if r.status != 1 || strings.Count(r.stderr, "\n") != 1 || !strings.Contains(r.stderr, tc.want) {
			t.Errorf("%s: status %d, %q; want status 1 and one line: %s", tc.name, r.status, r.stderr, tc.want)
		}
	}
	if r := d.try("snapshot", "create", "no", "--freeze", point, "--freeze", point); r.status != 1 || !strings.Contains(r.stderr, "it is frozen already") {
		t.Errorf("what is named twice: status %d, %q; want status 1 and that it is frozen already", r.status, r.stderr)
	}
	if isFrozen(t, point) {
		t.Error("the file system is still frozen after it was refused")
	}
	if exists(d.snapshot("no")) {
		t.Error("a snapshot was taken")
	}
}

// TestFreezeOfSubvolumes freezes what is the origin's file system under another number,
// and what is below it.
func TestFreezeOfSubvolumes(t *testing.T) {
	needRoot(t)
	need(t, "mkfs.btrfs", "btrfs")
	below := mountOther(t, 192*miB)
	disk := filepath.Join(below, "disk.img")
	write(t, disk, nil)
	if err := os.Truncate(disk, 160*miB); err != nil {
		t.Fatal(err)
	}
	run(t, "mkfs.btrfs", "-q", "-f", disk)
	dev := loop(t, disk, false)
	top := mount(t, dev, "btrfs", "")
	thawAtEnd(t, top)
	for _, name := range []string{"a", "b"} {
		run(t, "btrfs", "-q", "subvolume", "create", filepath.Join(top, name))
	}
	b := mount(t, dev, "btrfs", "subvol=b")
	origin := filepath.Join(top, "a", "vda.img")
	write(t, origin, make([]byte, miB))
	d := serve(t, origin)
	defer d.stop() // the origin's file system is to be unmounted
	for _, point := range []string{top, b, filepath.Join(top, "b"), below} {
		r := d.try("snapshot", "create", "--freeze", point)
		if want := "its file system holds the origin of device vda"; r.status != 1 || !strings.Contains(r.stderr, want) {
			t.Errorf("freeze %s: status %d, %q; want status 1 and that %s", point, r.status, r.stderr, want)
		}
	}
}

// TestThaw freezes a file system that the daemon has nothing to do with, and then
// the daemon or the command fails.
func TestThaw(t *testing.T) {
	needRoot(t)
	d, _ := serveOrigin(t, 4*miB)
	point := mountOther(t, 16*miB)

	t.Run("the command is killed", func(t *testing.T) {
		cmd := d.command("snapshot", "create", "killed", "--before", "kill -STOP "+pid(d), "--freeze", point)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		defer d.cmd.Process.Signal(syscall.SIGCONT)
		eventually(t, "the file system is frozen", func() bool { return isFrozen(t, point) })
		cmd.Process.Kill()
		cmd.Wait()
		eventually(t, "the file system is thawed", func() bool { return !isFrozen(t, point) })
	})
	t.Run("the freezer is killed", func(t *testing.T) {
		mine := filepath.Join(scratch(t), "pid") // of the command, the shell's parent
		before := fmt.Sprintf("echo $PPID > %s; kill -STOP %s", mine, pid(d))
		cmd := d.command("snapshot", "create", "alone", "--before", before, "--freeze", point)
		ended := make(chan result, 1)
		go func() { ended <- endWithin(t, time.Minute, cmd) }()
		defer d.cmd.Process.Signal(syscall.SIGCONT)
		eventually(t, "the file system is frozen", func() bool { return isFrozen(t, point) })
		children, err := filepath.Glob("/proc/" + read(t, mine) + "/task/*/children")
		if err != nil {
			t.Fatal(err)
		}
		for _, list := range children {
			for _, child := range strings.Fields(read(t, list)) {
				freezer, err := strconv.Atoi(child)
				if err != nil {
					t.Fatal(err)
				}
				syscall.Kill(freezer, syscall.SIGKILL)
			}
		}
		eventually(t, "the file system is thawed while the daemon hangs", func() bool { return !isFrozen(t, point) })
		d.cmd.Process.Signal(syscall.SIGCONT)
		if r := <-ended; r.status != 1 || !strings.Contains(r.stderr, "the freezer was killed") {
			t.Errorf("status %d: %s; want status 1 and that the freezer was killed", r.status, r.stderr)
		}
		if exists(d.snapshot("alone")) {
			t.Error("a snapshot stays whose file system was not frozen")
		}
	})
	t.Run("the daemon hangs", func(t *testing.T) {
		cmd := d.command("snapshot", "create", "late", "--before", "kill -STOP "+pid(d), "--freeze", point)
		ended := make(chan result, 1)
		go func() { ended <- endWithin(t, time.Minute, cmd) }()
		eventually(t, "the file system is frozen", func() bool { return isFrozen(t, point) })
		eventually(t, "the file system is thawed", func() bool { return !isFrozen(t, point) })
		d.cmd.Process.Signal(syscall.SIGCONT)
		r := <-ended
		if r.status != 1 || !strings.Contains(r.stderr, "had to be thawed") {
			t.Errorf("status %d: %s; want status 1 and that it had to be thawed", r.status, r.stderr)
		}
		if exists(d.snapshot("late")) {
			t.Error("a snapshot stays whose file system was not frozen")
		}
	})
}

// TestThawWithoutDaemon kills the daemon while a file system is frozen for it.
func TestThawWithoutDaemon(t *testing.T) {
	needRoot(t)
	d, origin := serveOrigin(t, 4*miB)
	point := mountOther(t, 16*miB)
	cmd := d.command("snapshot", "create", "s", "--before", "kill -STOP "+pid(d), "--freeze", point)
	ended := make(chan result, 1)
	go func() { ended <- endWithin(t, time.Minute, cmd) }()
	eventually(t, "the file system is frozen", func() bool { return isFrozen(t, point) })
	d.kill()
	if r := <-ended; r.status != 1 || strings.Count(r.stderr, "\n") != 1 {
		t.Errorf("status %d: %q; want status 1 and one line", r.status, r.stderr)
	}
	if isFrozen(t, point) {
		t.Error("the file system is still frozen")
	}
	d.start(origin)
	if exists(d.snapshot("s")) {
		t.Error("a snapshot was taken")
	}
}

// mountOther mounts a file system that the daemon has nothing to do with.
func mountOther(t *testing.T, size int64) string {
	t.Helper()
	disk := filepath.Join(scratch(t), "other.img")
	write(t, disk, nil)
	if err := os.Truncate(disk, size); err != nil {
		t.Fatal(err)
	}
	run(t, "mkfs.ext4", "-q", "-F", disk)
	point := mount(t, loop(t, disk, false), "ext4", "")
	thawAtEnd(t, point)
	return point
}

func pid(d *daemon) string { return strconv.Itoa(d.cmd.Process.Pid) }

func TestCommandsAround(t *testing.T) {
	needRoot(t)
	d, _ := serveOrigin(t, 4*miB)
	dir := scratch(t)
	told := filepath.Join(dir, "told")
	if got := d.blksnap("snapshot", "create", "a", "--before", "echo before >> "+told+"; echo noise",
		"--after", "ls "+d.mount+"/snapshots >> "+told); got != "a" {
		t.Errorf("snapshot create printed %q, want the name alone", got)
	}
	if got, want := read(t, told), "before\na\nlatest"; got != want {
		t.Errorf("the commands left %q, want %q", got, want)
	}
	r := d.try("snapshot", "create", "b", "--before", "exit 3", "--after", "echo after >> "+told)
	if r.status != 1 || !strings.Contains(r.stderr, "--before") {
		t.Errorf("status %d, %q; want status 1 and what failed", r.status, r.stderr)
	}
	if exists(d.snapshot("b")) {
		t.Error("a snapshot was taken though --before failed")
	}
	if !strings.HasSuffix(read(t, told), "after") {
		t.Error("--after did not run after --before had failed")
	}
	if r := d.try("snapshot", "create", "a", "--after", "echo still >> "+told); r.status != 1 || !strings.HasSuffix(read(t, told), "still") {
		t.Errorf("--after did not run where there was no snapshot: status %d, %s", r.status, r.stderr)
	}
	r = d.try("snapshot", "create", "c", "--after", "echo noise; exit 4")
	if r.status != 1 || !strings.Contains(r.stderr, `--after "echo noise; exit 4": exit status 4`) || !exists(d.snapshot("c")) {
		t.Errorf("after --after had failed: status %d, %q; want status 1, what failed, and the snapshot", r.status, r.stderr)
	}
	if r.stdout != "c\n" {
		t.Errorf("after --after had failed, snapshot create printed %q, want the name of the snapshot", r.stdout)
	}
}

// TestAfterRunsAlways ends the command in all ways while it waits.
func TestAfterRunsAlways(t *testing.T) {
	needRoot(t)
	d, _ := serveOrigin(t, 4*miB)
	for _, tc := range []struct {
		name string
		sig  syscall.Signal
		all  bool // its process group, as a terminal and timeout(1) do
	}{
		{"interrupted", syscall.SIGINT, true},
		{"terminated", syscall.SIGTERM, true},
		{"hung up", syscall.SIGHUP, true},
		{"killed", syscall.SIGKILL, false}, // as for want of memory
		{"all killed", syscall.SIGKILL, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			dir := scratch(t)
			begun, after := filepath.Join(dir, "begun"), filepath.Join(dir, "after")
			cmd := d.command("snapshot", "create", "--before", "touch "+begun+"; exec sleep 60", "--after", "sleep 0.1; cut -d' ' -f5 /proc/$$/stat > "+after)
			cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			eventually(t, "--before runs", func() bool { return exists(begun) })
			group := cmd.Process.Pid
			if tc.all {
				syscall.Kill(-group, tc.sig)
			} else {
				syscall.Kill(group, tc.sig)
			}
			cmd.Wait()
			eventually(t, "--after has run", func() bool { return exists(after) && read(t, after) != "" })
			if got, want := read(t, after), strconv.Itoa(group); got != want && !tc.all {
				t.Errorf("--after ran in process group %s, want %s, where --before still is", got, want)
			}
			syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) // --before
		})
	}
}

func TestTimeToLive(t *testing.T) {
	needRoot(t)
	d, origin := serveOrigin(t, 4*miB)
	d.blksnap("snapshot", "create", "short", "--ttl", "10s")
	d.blksnap("snapshot", "create", "long", "--ttl", "1h")
	open, err := os.Open(d.snapshot("short", "vda.img"))
	if err != nil {
		t.Fatal(err)
	}
	defer open.Close()
	d.kill() // the time goes on
	d.start(origin)
	eventually(t, "the snapshot's time is over", func() bool { return !exists(d.snapshot("short")) })
	if !exists(d.snapshot("long")) {
		t.Error("a snapshot ended before its time")
	}
	if r := d.try("snapshot", "create", "never", "--ttl", "-1s"); r.status != 1 && r.status != 2 {
		t.Errorf("a negative time to live ends with status %d", r.status)
	}
}
