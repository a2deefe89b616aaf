package cow

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// newFile makes a file of size bytes.
func newFile(t *testing.T, dir string, size int64) string {
	t.Helper()
	f, err := os.CreateTemp(dir, "*.img")
	if err == nil {
		err = errors.Join(f.Truncate(size), f.Close())
	}
	if err != nil {
		t.Fatal(err)
	}
	return f.Name()
}

// newLoop makes a loop device over file. It goes when the test ends, even if that
// is by a signal.
func newLoop(t *testing.T, file string) string {
	t.Helper()
	needRoot(t)
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		lacking(t, err.Error())
	}
	defer control.Close()
	back, err := os.OpenFile(file, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer back.Close()
	for range 20 { // others take loop devices, too
		n, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			lacking(t, "no free loop device: "+err.Error())
		}
		path := filepath.Join("/dev", fmt.Sprintf("loop%d", n))
		loop, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			lacking(t, err.Error())
		}
		err = unix.IoctlLoopConfigure(int(loop.Fd()), &unix.LoopConfig{
			Fd:   uint32(back.Fd()),
			Info: unix.LoopInfo64{Flags: unix.LO_FLAGS_AUTOCLEAR},
		})
		if err == nil {
			t.Cleanup(func() { loop.Close() })
			return path
		}
		loop.Close()
		if !errors.Is(err, syscall.EBUSY) {
			lacking(t, "configure "+path+": "+err.Error())
		}
	}
	t.Fatal("others take every loop device")
	return ""
}

// wantRefused checks that the origin is refused by one line that names it and says
// why.
func wantRefused(t *testing.T, path, why string, errno error) {
	t.Helper()
	o, err := OpenOrigin(path)
	if err == nil {
		o.Close()
		t.Errorf("%s was opened, but %s", path, why)
		return
	}
	if msg := err.Error(); !strings.Contains(msg, path) || !strings.Contains(msg, why) || strings.Contains(msg, "\n") {
		t.Errorf("error\n got %q\nwant one line with %q and %q", msg, path, why)
	}
	if errno != nil && !errors.Is(err, errno) {
		t.Errorf("error %q does not match %q", err, errno)
	}
}

func wantOpens(t *testing.T, path string) *Origin {
	t.Helper()
	o, err := OpenOrigin(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { o.Close() })
	return o
}

func TestOriginLockedByAnother(t *testing.T) {
	for _, how := range []string{"alone", "shared"} {
		t.Run(how, func(t *testing.T) {
			path := newFile(t, t.TempDir(), 1<<20)
			_, end := start(t, "lock", path, how)
			wantRefused(t, path, "is locked by another program", syscall.EBUSY)
			end()
			wantOpens(t, path)
		})
	}
}

// TestOriginHeldByAnother has another process, and then this one, hold the origin
// as we do.
func TestOriginHeldByAnother(t *testing.T) {
	path := newFile(t, t.TempDir(), 1<<20)
	_, end := start(t, "hold", path)
	wantRefused(t, path, "is locked by another program, perhaps another blksnap", syscall.EBUSY)
	end()
	o := wantOpens(t, path)
	wantRefused(t, path, "is locked by another program, perhaps another blksnap", syscall.EBUSY)
	link := path + ".link"
	if err := os.Symlink(path, link); err != nil {
		t.Fatal(err)
	}
	wantRefused(t, link, "is locked by another program", syscall.EBUSY)
	if err := o.Close(); err != nil {
		t.Fatal(err)
	}
	wantOpens(t, link)
}

// TestOriginLockedByBytes has another process say with QEMU's locks what it does
// with the image and what it lets others do.
func TestOriginLockedByBytes(t *testing.T) {
	for _, tc := range []struct {
		name string
		at   int64
		free bool
	}{
		{"reads", qemuUses + permRead, true},
		{"writes", qemuUses + permWrite, false},
		{"writes what is there", qemuUses + permWriteUnchanged, false},
		{"resizes", qemuUses + permResize, false},
		{"lets nobody read", qemuUnshared + permRead, false},
		{"lets nobody write", qemuUnshared + permWrite, false},
		{"lets nobody write what is there", qemuUnshared + permWriteUnchanged, false},
		{"lets nobody resize", qemuUnshared + permResize, false},
		{"something else", qemuUses - 1, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			path := newFile(t, t.TempDir(), 1<<20)
			start(t, "byte", path, fmt.Sprint(tc.at))
			if tc.free {
				wantOpens(t, path)
			} else {
				wantRefused(t, path, "is in use by QEMU or a program that locks like it", syscall.EBUSY)
			}
		})
	}
}

// TestOriginSaysWhatItDoes looks at the locks of an origin as QEMU would.
func TestOriginSaysWhatItDoes(t *testing.T) {
	path := newFile(t, t.TempDir(), 1<<20)
	wantOpens(t, path)
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var got []int64
	for at := int64(0); at < 300; at++ {
		lk := unix.Flock_t{Type: unix.F_WRLCK, Start: at, Len: 1}
		if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_GETLK, &lk); err != nil {
			t.Fatal(err)
		}
		if lk.Type != unix.F_UNLCK {
			got = append(got, at)
		}
	}
	// It reads, writes, and resizes; others may do nothing but read.
	if want := []int64{100, 101, 102, 103, 201, 202, 203}; !slices.Equal(got, want) {
		t.Errorf("locked bytes\n got %d\nwant %d", got, want)
	}
}

// qemu runs qemu-io over an image until end is called, and returns when it has it
// open.
func qemu(t *testing.T, path string, flags ...string) (end func()) {
	t.Helper()
	need(t, "qemu-io")
	c := exec.Command("qemu-io", append(flags, "-f", "raw", path)...)
	c.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	c.Stderr = os.Stderr
	out, end := startPiped(t, c)
	var said []byte
	for b := make([]byte, 1); !strings.HasSuffix(string(said), "qemu-io> "); said = append(said, b[0]) {
		if _, err := out.Read(b); err != nil {
			t.Fatalf("qemu-io ended: %s", said)
		}
	}
	return end
}

func TestOriginUsedByQEMU(t *testing.T) {
	path := newFile(t, t.TempDir(), 1<<20)
	end := qemu(t, path)
	wantRefused(t, path, "is in use by QEMU", syscall.EBUSY)
	end()
	o := wantOpens(t, path)
	o.Close()

	end = qemu(t, path, "-r") // a reader is in nobody's way
	o = wantOpens(t, path)
	o.Close()
	end()
}

// TestQEMURefusesOrigin checks that QEMU does not write to an origin that we hold,
// and may read it.
func TestQEMURefusesOrigin(t *testing.T) {
	need(t, "qemu-io", "qemu-img")
	path := newFile(t, t.TempDir(), 1<<20)
	o := wantOpens(t, path)
	for _, tc := range []struct {
		name string
		args []string
		ok   bool
	}{
		{"write", []string{"qemu-io", "-f", "raw", "-c", "write -P 1 0 512", path}, false},
		{"resize", []string{"qemu-img", "resize", "-f", "raw", path, "2M"}, false},
		{"look", []string{"qemu-img", "info", "-f", "raw", path}, true},
		{"read", []string{"qemu-io", "-r", "-f", "raw", "-c", "read -P 0 0 512", path}, true},
	} {
		out, err := exec.Command(tc.args[0], tc.args[1:]...).CombinedOutput()
		if ok := err == nil; ok != tc.ok {
			t.Errorf("%s: got %v, want it to work: %v\n%s", tc.name, err, tc.ok, out)
		}
		if !tc.ok && !strings.Contains(string(out), "lock") {
			t.Errorf("%s: QEMU says %q, nothing of a lock", tc.name, out)
		}
	}
	b := make([]byte, 1)
	if _, err := o.file.ReadAt(b, 0); err != nil || b[0] != 0 || o.Size() != 1<<20 {
		t.Errorf("QEMU changed the origin: first byte %d, %v", b[0], err)
	}
	o.Close()
	if out, err := exec.Command("qemu-io", "-f", "raw", "-c", "write -P 1 0 512", path).CombinedOutput(); err != nil {
		t.Errorf("QEMU on an origin that was closed: %v\n%s", err, out)
	}
}

func TestOriginBehindLoop(t *testing.T) {
	path := newFile(t, t.TempDir(), 1<<20)
	t.Run("attached", func(t *testing.T) {
		loop := newLoop(t, path)
		wantRefused(t, path, "is in use: it backs "+loop, syscall.EBUSY)
	})
	wantOpens(t, path)
}

func TestOriginMounted(t *testing.T) {
	need(t, "mkfs.ext4")
	path := newFile(t, t.TempDir(), 4<<20)
	loop := newLoop(t, path)
	if out, err := exec.Command("mkfs.ext4", "-q", loop).CombinedOutput(); err != nil {
		t.Fatalf("mkfs.ext4: %v\n%s", err, out)
	}
	_, end := start(t, "mount", loop, t.TempDir())
	wantRefused(t, loop, "is mounted or otherwise in use", syscall.EBUSY)
	end()
	o := wantOpens(t, loop)
	if o.Size() != 4<<20 {
		t.Errorf("size of %s: got %d, want %d", loop, o.Size(), 4<<20)
	}
	// And while we hold it nobody can mount it.
	dir := t.TempDir()
	if err := unix.Mount(loop, dir, "ext4", 0, ""); err == nil {
		unix.Unmount(dir, unix.MNT_DETACH)
		t.Error("an origin that we hold was mounted")
	} else if err != unix.EBUSY {
		t.Errorf("mount an origin that we hold: got %v, want EBUSY", err)
	}
	wantRefused(t, loop, "is mounted or otherwise in use", syscall.EBUSY)
}
