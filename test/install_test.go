// What make install puts there, and mounting by a line of fstab.

package test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// installed returns the directory of a binary that make installed.
func installed(t *testing.T) (bin string) {
	t.Helper()
	need(t, "make")
	dest := scratch(t)
	cmd := exec.Command("make", "-C", "..", "--no-print-directory", "install", "DESTDIR="+dest)
	if r := endWithin(t, 10*patience, cmd); r.status != 0 { // it may have to compile everything
		t.Fatalf("make install: status %d: %s%s", r.status, r.stdout, r.stderr)
	}
	return filepath.Join(dest, "usr/local/bin")
}

func TestInstall(t *testing.T) {
	bin := installed(t)
	if got := run(t, filepath.Join(bin, "blksnap"), "version"); !strings.HasPrefix(got, "blksnap ") {
		t.Errorf("the installed binary says %q", got)
	}
	manual := filepath.Join(bin, "../share/man/man8/blksnap.8")
	if !strings.HasPrefix(read(t, manual), ".") {
		t.Errorf("%s is not a manual page", manual)
	}
	run(t, "make", "-C", "..", "--no-print-directory", "uninstall", "DESTDIR="+filepath.Join(bin, "../../.."))
	if left := run(t, "find", filepath.Join(bin, "../../.."), "-type", "f"); left != "" {
		t.Errorf("make uninstall left %s", left)
	}
}

// fstab is a table of its own for mount(8), with one line.
type fstab struct {
	*daemon
	file string
}

// newFstab installs blksnap where mount(8) finds it and writes a line that
// mounts a device over origin.
func newFstab(t *testing.T, origin string) *fstab {
	t.Helper()
	needRoot(t)
	need(t, "mount.fuse3")
	bin := installed(t)
	f := &fstab{daemon: newDaemon(t, nil)}

	// mount(8) takes $PATH away from its helpers; the shell then looks into
	// the usual directories. This one is seldom used, and is hidden for the
	// tests alone.
	const usual = "/usr/local/sbin"
	if err := unix.Mount(bin, usual, "", unix.MS_BIND, ""); err != nil {
		t.Fatalf("show %s at %s: %v", bin, usual, err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(usual, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})

	f.file = filepath.Join(f.dir, "fstab")
	write(t, f.file, fmt.Appendf(nil, "blksnap %s fuse.blksnap origin=vda=%s,run=%s,state=%s,store=mem:16MiB,nofail,rw,dev 0 0\n",
		f.mount, origin, f.runDir, f.state))
	t.Cleanup(func() {
		for _, pid := range f.pids() {
			t.Errorf("the daemon is still there, as process %d", pid)
			syscall.Kill(pid, syscall.SIGKILL)
		}
		unix.Unmount(f.mount, unix.MNT_DETACH)
	})
	return f
}

// try mounts as the boot does.
func (f *fstab) try() result {
	return end(f.t, exec.Command("mount", "--fstab", f.file, f.mount))
}

// pids are the processes that were told of the daemon's run directory.
func (f *fstab) pids() (pids []int) {
	lines, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, path := range lines {
		line, err := os.ReadFile(path)
		if err == nil && strings.Contains(string(line), f.runDir) {
			pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(path)))
			pids = append(pids, pid)
		}
	}
	return pids
}

func (f *fstab) waitForEnd() {
	f.t.Helper()
	eventually(f.t, "the daemon ends", func() bool { return len(f.pids()) == 0 })
}

func TestFstab(t *testing.T) {
	origin := makeOrigin(t, scratch(t), "vda", 4*miB)
	f := newFstab(t, origin)
	if r := f.try(); r.status != 0 {
		t.Fatalf("mount: status %d: %s", r.status, r.stderr)
	}
	if got, want := read(t, f.device("vda", "origin")), origin; got != want {
		t.Errorf("origin\n got %s\nwant %s", got, want)
	}
	live := f.open("vda") // the socket is there as soon as mount returns
	mkdir(t, f.snapshot("s1"))
	p := make([]byte, SectorSize)
	Stamp(p, "vda", 0, 2)
	if err := live.writeAt(p, 0); err != nil {
		t.Fatal(err)
	}

	// A disk does not vanish under a machine.
	run(t, "umount", f.mount)
	if err := live.readAt(p, 0); err != nil {
		t.Errorf("read after umount: %v", err)
	}
	if err := Verify(p, "vda", 0, 2, 2); err != nil {
		t.Error(err)
	}
	if err := live.request(NBD_CMD_DISC, 0, 0, 0, nil); err != nil {
		t.Error(err)
	}
	f.waitForEnd()

	// Nobody uses it: umount is the end.
	if r := f.try(); r.status != 0 {
		t.Fatalf("mount again: status %d: %s", r.status, r.stderr)
	}
	run(t, "umount", f.mount)
	f.waitForEnd()
}

func TestFstabFailsWithTheReason(t *testing.T) {
	f := newFstab(t, "/nowhere/vda.img")
	r := f.try()
	if r.status == 0 {
		t.Fatal("mount of an origin that does not exist succeeded")
	}
	if !strings.Contains(r.stderr, "/nowhere/vda.img") {
		t.Errorf("mount says %q, want the origin's path", r.stderr)
	}
	f.waitForEnd()
}

// Without any directory given, an unprivileged user gets them below
// $XDG_RUNTIME_DIR, or below /tmp where that is not set.
func TestUnprivilegedDefaults(t *testing.T) {
	needRoot(t)
	need(t, "fusermount3")
	const uid = 54321 // has no directory in /tmp that anybody uses
	for _, tc := range []struct {
		name string
		user *syscall.Credential
		xdg  bool
		args []string
	}{
		{"with XDG_RUNTIME_DIR", nobody, true, nil},
		{"without", &syscall.Credential{Uid: uid, Gid: uid}, false, []string{"--mount", "none"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			d := newDaemon(t, tc.user)
			origin := makeOrigin(t, d.dir, "vda", miB)
			if err := os.Chown(origin, int(tc.user.Uid), int(tc.user.Gid)); err != nil {
				t.Fatal(err)
			}
			d.env = []string{"PATH=" + os.Getenv("PATH"), "XDG_STATE_HOME=" + filepath.Join(d.dir, "home"), "HOME=" + d.dir}
			home := fmt.Sprintf("/tmp/blksnap-%d", tc.user.Uid)
			if tc.xdg {
				home = d.dir
				d.env = append(d.env, "XDG_RUNTIME_DIR="+home)
				d.mount, d.runDir = filepath.Join(home, "blksnap"), filepath.Join(home, "blksnapd")
			} else {
				t.Cleanup(func() { os.RemoveAll(home) })
			}
			d.startPlain(append(tc.args, origin)...)
			if got := d.blksnap("device", "list"); !strings.Contains(got, origin) {
				t.Errorf("device list says %q", got)
			}
			if st, err := os.Stat(home); !tc.xdg && (err != nil || st.Mode().Perm() != 0o700) {
				t.Errorf("%s: %v, %v, want mode 0700", home, st, err)
			}
			if tc.xdg {
				// root may not: the tree is for the user who mounted it
				if r := d.asUser(`mkdir $1; cat $1/vda.img > /dev/null; rmdir $1`, d.snapshot("s1")); r.status != 0 {
					t.Errorf("the user's own tree: %s", r.stderr)
				}
			}
		})
	}
}
