package store

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	fusefs "github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

func TestFileIsCreated(t *testing.T) {
	path := filepath.Join(t.TempDir(), "store")
	part := openFile(t, path, 1<<20)
	defer part.Close()
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if got, want := info.Mode(), os.FileMode(0o600); got != want {
		t.Errorf("mode\n got %v\nwant %v", got, want)
	}
	got := part.Traits()
	want := Traits{
		Spec:    Spec{File, path, 1 << 20},
		ID:      got.ID,
		Limit:   1 << 20,
		Slots:   256,
		MayHang: true,
	}
	if got != want || got.ID == [16]byte{} {
		t.Errorf("traits\n got %+v\nwant %+v with an ID", got, want)
	}
}

// TestFileKeepsItsHeader opens a store again, with and without a limit.
func TestFileKeepsItsHeader(t *testing.T) {
	path := filepath.Join(t.TempDir(), "store")
	part := openFile(t, path, 1<<20)
	id := part.Traits().ID
	part.Close()
	for _, tc := range []struct {
		name        string
		limit, want int64
		force       bool
	}{
		{name: "no limit", limit: 0, want: 1 << 20},
		{name: "another limit", limit: 2 << 20, want: 2 << 20},
		{name: "that limit stays", limit: 0, want: 2 << 20},
		{name: "force keeps a good store", limit: 0, want: 2 << 20, force: true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			part, err := OpenFile(path, tc.limit, tc.force)
			if err != nil {
				t.Fatal(err)
			}
			defer part.Close()
			if got := part.Traits(); got.Limit != tc.want || got.ID != id {
				t.Errorf("OpenFile with limit %d\n got limit %d, ID %v\nwant limit %d, ID %v", tc.limit, got.Limit, got.ID, tc.want, id)
			}
		})
	}
}

func TestFileDefaultLimit(t *testing.T) {
	path := filepath.Join(t.TempDir(), "store")
	var s unix.Statfs_t
	if err := unix.Statfs(filepath.Dir(path), &s); err != nil {
		t.Fatal(err)
	}
	half := int64(s.Bavail) * s.Bsize / 2
	part := openFile(t, path, 0)
	limit := part.Traits().Limit
	part.Close()
	if limit%SlotSize != 0 || limit < half*9/10 || limit > half*11/10 {
		t.Errorf("default limit\n got %d\nwant about half of the free space, %d, in whole slots", limit, half)
	}
	part = openFile(t, path, 0)
	defer part.Close()
	if again := part.Traits().Limit; again != limit {
		t.Errorf("default limit of a store that exists\n got %d\nwant %d as before", again, limit)
	}
}

// TestFileRefuses opens what is no store. Nothing may change by it.
func TestFileRefuses(t *testing.T) {
	good := goldenHeader.encode()
	newer := bytes.Clone(good)
	newer[16] = 2
	damaged := bytes.Clone(good)
	damaged[100] = 1
	dir := t.TempDir()
	file := func(name string, content []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, content, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	for _, tc := range []struct {
		name  string
		path  string
		limit int64
		is    error // what errors.Is must find, if anything
		says  string
	}{
		{"foreign data", file("foreign", []byte("a disk image")), 0, ErrForeign, "not a snapstore"},
		{"zeroes", file("zeroes", make([]byte, 1<<20)), 0, ErrForeign, "not a snapstore"},
		{"newer version", file("newer", newer), 0, ErrNewer, "made by a newer version of blksnap: version 2 of its header"},
		{"damaged", file("damaged", damaged), 0, ErrDamaged, "damaged snapstore: its header has checksum"},
		{"cut off", file("cut", good[:100]), 0, ErrDamaged, "damaged snapstore: its header ends after 100 bytes"},
		{"a directory", dir, 0, nil, "it is not a regular file (drwx"},
		{"no directory", filepath.Join(dir, "none", "store"), 0, nil, "its directory " + filepath.Join(dir, "none") + " does not exist"},
		{"a character device", "/dev/null", 0, nil, "it is a device; use dev:/dev/null"},
		{"limit below a slot", filepath.Join(dir, "new"), SlotSize - 1, nil, "limit 65535 is too small: a chunk takes 64KiB"},
		{"negative limit", filepath.Join(dir, "new"), -1, nil, "limit -1 is too small: a chunk takes 64KiB"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			before, _ := os.ReadFile(tc.path)
			part, err := OpenFile(tc.path, tc.limit, false)
			if err == nil {
				part.Close()
				t.Fatalf("OpenFile(%s): no error", tc.path)
			}
			want := "open snapstore " + tc.path + ": " + tc.says
			if !strings.HasPrefix(err.Error(), want) || strings.Contains(err.Error(), "\n") || tc.is != nil && !errors.Is(err, tc.is) {
				t.Errorf("OpenFile(%s)\n got %v\nwant %s...", tc.path, err, want)
			}
			if after, _ := os.ReadFile(tc.path); !bytes.Equal(after, before) {
				t.Errorf("%s changed", tc.path)
			}
		})
	}
	if _, err := os.Stat(filepath.Join(dir, "new")); err == nil {
		t.Errorf("a refused limit left a file behind")
	}
}

func TestFileForce(t *testing.T) {
	for _, tc := range []struct {
		name    string
		content []byte
	}{
		{"foreign", bytes.Repeat([]byte("image"), 100_000)},
		{"damaged", goldenHeader.encode()[:1000]},
		{"newer", append([]byte(headerMagic+"\x02\x00\x00\x00"), make([]byte, 5000)...)},
	} {
		t.Run(tc.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "store")
			if err := os.WriteFile(path, tc.content, 0o600); err != nil {
				t.Fatal(err)
			}
			part, err := OpenFile(path, 1<<20, true)
			if err != nil {
				t.Fatalf("OpenFile with force: %v", err)
			}
			defer part.Close()
			if got := part.Traits().Held; got != 0 {
				t.Errorf("slots held\n got %d\nwant 0", got)
			}
			if got := backingOf(t, path); got > 8192 {
				t.Errorf("bytes on disk\n got %d\nwant the header alone", got)
			}
		})
	}
}

func TestFileInUse(t *testing.T) {
	path := filepath.Join(t.TempDir(), "store")
	part := openFile(t, path, 1<<20)
	for _, force := range []bool{false, true} {
		if _, err := OpenFile(path, 0, force); !errors.Is(err, ErrInUse) {
			t.Errorf("OpenFile of an open store, force %v\n got %v\nwant %v", force, err, ErrInUse)
		}
	}
	part.Close()
	openFile(t, path, 0).Close()
}

// TestForceSparesLockedImages: a disk image that QEMU has open is locked as
// here, and no force takes it away.
func TestForceSparesLockedImages(t *testing.T) {
	path := filepath.Join(t.TempDir(), "image")
	content := []byte("the disk of a running machine")
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	l := unix.Flock_t{Type: unix.F_RDLCK, Start: 100, Len: 1}
	if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &l); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenFile(path, 1<<20, true); !errors.Is(err, ErrInUse) {
		t.Errorf("OpenFile with force\n got %v\nwant %v", err, ErrInUse)
	}
	if after, _ := os.ReadFile(path); !bytes.Equal(after, content) {
		t.Errorf("the image\n got %q\nwant %q", after, content)
	}
}

// TestForceCountsWhatItFrees: what a file holds that is taken over is free for
// the store.
func TestForceCountsWhatItFrees(t *testing.T) {
	if !inNamespace(t) {
		return
	}
	path := filepath.Join(mountTmpfs(t, "64m"), "store")
	if err := os.WriteFile(path, make([]byte, 40<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	part, err := OpenFile(path, 0, true)
	if err != nil {
		t.Fatal(err)
	}
	defer part.Close()
	if got, want := part.Traits().Limit, int64(32<<20); got != want {
		t.Errorf("default limit\n got %d\nwant half of the file system, %d", got, want)
	}
}

func TestFileOnAFullDisk(t *testing.T) {
	if !inNamespace(t) {
		return
	}
	dir := mountTmpfs(t, "1m")
	fill := filepath.Join(dir, "fill")
	for _, tc := range []struct {
		name  string
		fill  int
		limit int64
		says  string
	}{
		{"half of nothing", 0, 0, "its file system has 1048576 bytes free, half of which is less than 16MiB: free some or give a limit"},
		{"no room for the header", 1 << 20, 1 << 20, "write header: no space left on device"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if err := os.WriteFile(fill, make([]byte, tc.fill), 0o600); err != nil {
				t.Fatal(err)
			}
			path := filepath.Join(dir, "store")
			_, err := OpenFile(path, tc.limit, false)
			if want := "open snapstore " + path + ": " + tc.says; err == nil || err.Error() != want {
				t.Errorf("OpenFile\n got %v\nwant %s", err, want)
			}
			if _, err := os.Stat(path); err == nil {
				t.Errorf("%s was left behind", path)
			}
		})
	}
}

// plainFile is a file without holes.
type plainFile struct{ fusefs.MemRegularFile }

func (*plainFile) Allocate(context.Context, fusefs.FileHandle, uint64, uint64, uint32) syscall.Errno {
	return syscall.EOPNOTSUPP
}

func (*plainFile) Fsync(context.Context, fusefs.FileHandle, uint32) syscall.Errno { return 0 }

// mountPlain mounts a file system with a plainFile, for use in a namespace, and
// returns the path of the file.
func mountPlain(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	root := &fusefs.Inode{}
	server, err := fusefs.Mount(dir, root, &fusefs.Options{
		MountOptions: fuse.MountOptions{DirectMountStrict: true},
		OnAdd: func(ctx context.Context) {
			file := root.NewPersistentInode(ctx, &plainFile{}, fusefs.StableAttr{})
			root.AddChild("store", file, true)
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := server.Unmount(); err != nil {
			t.Errorf("unmount: %v", err)
		}
	})
	return filepath.Join(dir, "store")
}

// TestFileThatCannotPunch uses a file system, by FUSE, in which files have no
// holes: there slots count whole, and keep their backing.
func TestFileThatCannotPunch(t *testing.T) {
	if !inNamespace(t) {
		return
	}
	part, err := OpenFile(mountPlain(t), 4<<20, false)
	if err != nil {
		t.Fatal(err)
	}
	if got := part.Traits(); !got.Coarse || got.Slots != 64 {
		t.Errorf("traits\n got %+v\nwant coarse, 64 slots", got)
	}
	m := newModel(t, newRand(t), openPool(t, part))
	for range 1000 {
		m.step()
	}
	if err := m.p.Discard(); err != nil {
		t.Fatal(err)
	}
	m.check()
}

// TestFileSizeLimit: a limit on the size of files is a full store, neither a
// signal nor a failed part.
func TestFileSizeLimit(t *testing.T) {
	p := openPool(t, openFile(t, filepath.Join(t.TempDir(), "store"), 64<<20), openMem(t, 64<<20))
	var old unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_FSIZE, &old); err != nil {
		t.Fatal(err)
	}
	if err := unix.Setrlimit(unix.RLIMIT_FSIZE, &unix.Rlimit{Cur: 10 << 20, Max: old.Max}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Setrlimit(unix.RLIMIT_FSIZE, &old); err != nil {
			t.Error(err)
		}
	})
	written := 0
	for range 400 {
		s := allocOne(t, p, 0b1111_0000_0000_0001)
		err := p.WriteAt(s, make([]byte, BlockSize), 15*BlockSize)
		if err == nil {
			written++
			continue
		}
		if !errors.Is(err, syscall.ENOSPC) {
			t.Fatalf("WriteAt beyond the limit\n got %v\nwant %v", err, syscall.ENOSPC)
		}
		p.Free(s, 0b1111_0000_0000_0001)
	}
	if info := p.Parts(); info[0].State != "ok" || info[0].Used < 9<<20/16*5 || info[1].Used == 0 {
		t.Errorf("parts\n got %+v\nwant 9 MiB of slots or more in the file, then memory", info)
	}
	// The file is tried again each second; without being left alone in between it
	// would have refused 240 of them.
	if written < 300 {
		t.Errorf("blocks written\n got %d of 400\nwant 300 or more", written)
	}
}

// TestFileCutShort: what somebody cut off is an error, also where it reads as zeroes
// because the file has grown again.
func TestFileCutShort(t *testing.T) {
	for _, tc := range []struct {
		name string
		size int64 // that is left
		next int64 // where something is written then
	}{
		{"and not written", 0, -1},
		{"and written further on", 0, 8 << 20},
		{"between blocks", dataStart + 3*SlotSize - BlockSize, 8 << 20},
		{"in a block", dataStart + 3*SlotSize - 1, 8 << 20},
		{"and grown", 0, growStep},
	} {
		t.Run(tc.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "store")
			p, err := OpenFile(path, 64<<20, false)
			if err != nil {
				t.Fatal(err)
			}
			defer p.Close()
			b := bytes.Repeat([]byte{0xa5}, SlotSize)
			if _, err := p.WriteAt(b, 2*SlotSize); err != nil {
				t.Fatal(err)
			}
			if err := os.Truncate(path, tc.size); err != nil {
				t.Fatal(err)
			}
			if tc.next >= 0 {
				p.WriteAt(b, tc.next) // which may fail
			}
			if n, err := p.ReadAt(b, 2*SlotSize); err == nil {
				t.Errorf("read of what was cut off: no error, and %d bytes, the first of them %#x", n, b[0])
			}
			if _, err := p.Avail(); !errors.Is(err, unix.EIO) {
				t.Errorf("ask for free space\n got %v\nwant %v", err, unix.EIO)
			}
		})
	}
}
