package store

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestDevIsCreated(t *testing.T) {
	path := loopDevice(t, sparseFile(t, t.TempDir(), 2<<20))
	part, err := OpenDev(path, false)
	if err != nil {
		t.Fatal(err)
	}
	got := part.Traits()
	want := Traits{
		Spec:    Spec{Kind: Dev, Path: path},
		ID:      got.ID,
		Limit:   31 * SlotSize,
		Slots:   31,
		Coarse:  true,
		MayHang: true,
	}
	if got != want || got.ID == [16]byte{} {
		t.Errorf("traits\n got %+v\nwant %+v with an ID", got, want)
	}
	if err := part.Close(); err != nil {
		t.Fatal(err)
	}
	part, err = OpenDev(path, false)
	if err != nil {
		t.Fatalf("open it again: %v", err)
	}
	defer part.Close()
	if again := part.Traits(); again.ID != got.ID || again.Held != 31 {
		t.Errorf("opened again\n got ID %v, %d slots held\nwant ID %v, 31", again.ID, again.Held, got.ID)
	}
}

func TestDevInUse(t *testing.T) {
	path := loopDevice(t, sparseFile(t, t.TempDir(), 2<<20))
	part, err := OpenDev(path, false)
	if err != nil {
		t.Fatal(err)
	}
	defer part.Close()
	for _, force := range []bool{false, true} {
		if _, err := OpenDev(path, force); !errors.Is(err, ErrInUse) {
			t.Errorf("OpenDev of an open device, force %v\n got %v\nwant %v", force, err, ErrInUse)
		}
	}
}

func TestDevMounted(t *testing.T) {
	if !inNamespace(t) {
		return
	}
	file := sparseFile(t, t.TempDir(), 16<<20)
	run(t, "mkfs.ext4", "-q", file)
	path, dir := loopDevice(t, file), t.TempDir()
	if err := unix.Mount(path, dir, "ext4", 0, ""); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(dir, 0)
	if _, err := OpenDev(path, true); !errors.Is(err, ErrInUse) {
		t.Errorf("OpenDev of a mounted device, with force\n got %v\nwant %v", err, ErrInUse)
	}
}

func TestDevRefuses(t *testing.T) {
	dir := t.TempDir()
	ext4 := sparseFile(t, dir, 16<<20)
	run(t, "mkfs.ext4", "-q", ext4)
	small := filepath.Join(dir, "small")
	if err := os.WriteFile(small, make([]byte, 2*SlotSize-512), 0o600); err != nil {
		t.Fatal(err)
	}
	dev, tiny := loopDevice(t, ext4), loopDevice(t, small)
	for _, tc := range []struct{ name, path, says string }{
		{"foreign", dev, "not a snapstore: it bears the signature of ext2, ext3 or ext4"},
		{"too small", tiny, "its 130560 bytes are too few: a snapstore takes 128KiB"},
		{"a file", ext4, "it is not a block device; a file is file:" + ext4},
		{"a character device", "/dev/null", "it is not a block device; a file is file:/dev/null"},
		{"nothing", filepath.Join(dir, "none"), "no such file or directory"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, err := OpenDev(tc.path, false)
			if want := "open snapstore " + tc.path + ": " + tc.says; err == nil || err.Error() != want {
				t.Errorf("OpenDev\n got %v\nwant %s", err, want)
			}
		})
	}
	run(t, "e2fsck", "-fn", ext4)
}

// TestDevForceWipes takes over a device with several signatures; none of them
// is there afterwards, so that nobody takes it back.
func TestDevForceWipes(t *testing.T) {
	file := sparseFile(t, t.TempDir(), 16<<20)
	run(t, "mkfs.ext4", "-q", file)
	f, err := os.OpenFile(file, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range []signature{{"btrfs", 0x10040, "_BHRfS_M"}, {"GPT", 16<<20 - 512, "EFI PART"}} {
		if _, err := f.WriteAt([]byte(s.magic), s.off); err != nil {
			t.Fatal(err)
		}
	}
	f.Close()
	path := loopDevice(t, file)
	part, err := OpenDev(path, true)
	if err != nil {
		t.Fatalf("OpenDev with force: %v", err)
	}
	if held := part.Traits().Held; held != 0 {
		t.Errorf("slots held\n got %d\nwant 0", held)
	}
	if err := part.Close(); err != nil {
		t.Fatal(err)
	}
	dev, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer dev.Close()
	var left []string
	for s, err := range signatures(dev, 16<<20) {
		if err != nil {
			t.Fatal(err)
		}
		left = append(left, s.name)
	}
	if got, want := strings.Join(left, ", "), "a snapstore"; got != want {
		t.Errorf("signatures left\n got %s\nwant %s", got, want)
	}
}

// TestDevDiscards sees the file under a loop device lose its backing.
func TestDevDiscards(t *testing.T) {
	file := sparseFile(t, t.TempDir(), 16<<20)
	part, err := OpenDev(loopDevice(t, file), false)
	if err != nil {
		t.Fatal(err)
	}
	p := openPool(t, part)
	var slots []Slot
	for range 100 {
		s := allocOne(t, p, AllBlocks)
		if err := p.WriteAt(s, make([]byte, SlotSize), 0); err != nil {
			t.Fatal(err)
		}
		slots = append(slots, s)
	}
	syncFile(t, part)
	if got, want := backingOf(t, file), int64(100*SlotSize); got < want {
		t.Fatalf("bytes under 100 slots in use\n got %d\nwant at least %d", got, want)
	}
	for _, s := range slots {
		p.Free(s, AllBlocks)
	}
	if err := p.Discard(); err != nil {
		t.Fatal(err)
	}
	if got := backingOf(t, file); got > SlotSize {
		t.Errorf("bytes under a store that is empty\n got %d\nwant next to none", got)
	}
}

// TestDevThatCannotDiscard: what is free stays where it is, and can be used.
func TestDevThatCannotDiscard(t *testing.T) {
	if !inNamespace(t) {
		return
	}
	file := mountPlain(t)
	if err := os.Truncate(file, 4<<20); err != nil {
		t.Fatal(err)
	}
	part, err := OpenDev(loopDevice(t, file), false)
	if err != nil {
		t.Fatal(err)
	}
	m := newModel(t, newRand(t), openPool(t, part))
	for range 500 {
		m.step()
	}
	for len(m.slots) > 0 {
		m.free()
	}
	if err := m.p.Discard(); err != nil {
		t.Errorf("Discard: %v", err)
	}
	m.check()
	if !part.(*devPart).noDiscard.Load() {
		t.Errorf("the device goes on being asked to discard")
	}
}

// syncFile waits until what was written to a part is on its disk.
func syncFile(t testing.TB, part Part) {
	t.Helper()
	var f *os.File
	switch p := part.(type) {
	case *devPart:
		f = p.f
	case *filePart:
		f = p.f
	}
	if err := f.Sync(); err != nil {
		t.Fatalf("sync %s: %v", f.Name(), err)
	}
}

// TestLostWriteIsNoticed has a disk refuse what the page cache writes back. The
// pages are dropped then, and reading returns what was on the disk before: a
// pool must not pass that on.
func TestLostWriteIsNoticed(t *testing.T) {
	if !inNamespace(t) {
		return
	}
	// The file system has no room for what the device says it has.
	path := loopDevice(t, sparseFile(t, mountTmpfs(t, "4m"), 64<<20))
	part, err := OpenDev(path, false)
	if err != nil {
		t.Fatal(err)
	}
	p := openPool(t, part)
	want := make([]byte, SlotSize)
	for i := range want {
		want[i] = 0xa5
	}
	var slots []Slot
	for range 500 {
		s := allocOne(t, p, AllBlocks)
		if err := p.WriteAt(s, want, 0); err != nil {
			t.Fatal(err)
		}
		slots = append(slots, s)
	}
	// Another descriptor's sync takes no error away from the pool's.
	dev, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer dev.Close()
	if err := dev.Sync(); err == nil {
		t.Fatal("sync of a device whose disk is full: no error")
	}
	if err := unix.Fadvise(int(dev.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
		t.Fatal(err)
	}
	got, wrong, refused := make([]byte, SlotSize), 0, 0
	for _, s := range slots {
		err := p.ReadAt(s, got, 0)
		switch {
		case err == nil && string(got) != string(want):
			wrong++
		case errors.Is(err, unix.EIO) && !errors.Is(err, unix.ENOSPC):
			refused++
		case err != nil:
			t.Fatalf("read of slot %v\n got %v\nwant %v", s, err, unix.EIO)
		}
	}
	if wrong != 0 || refused == 0 {
		t.Errorf("reads of 500 slots of which many were lost\n got %d with wrong bytes, %d refused\nwant none with wrong bytes", wrong, refused)
	}
	if got := p.Parts()[0].State; !strings.HasPrefix(got, "failed: an earlier write did not reach the disk") {
		t.Errorf("state of the part\n got %s\nwant failed", got)
	}
}
