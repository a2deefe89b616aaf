package fusefs

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// holey returns size bytes that are random in some 64 KiB pieces and zero in the
// others.
func holey(t *testing.T, size int) []byte {
	t.Logf("repeat with -seed=%d", *seed)
	rng := rand.New(rand.NewPCG(*seed, 1))
	p := make([]byte, size)
	for off := 0; off < size; off += 64 << 10 {
		if off == 0 || rng.IntN(3) == 0 { // the first, so that there is one
			for i := range p[off:min(off+64<<10, size)] {
				p[off+i] = byte(rng.Uint32() | 1)
			}
		}
	}
	return p
}

// mountImage mounts a tree with the one snapshot "one" of the one device "vda",
// and returns the image and the directory in which it is.
func mountImage(t testing.TB, content []byte, writable bool) (*fakeImage, string) {
	t.Helper()
	src := newFakeSource()
	src.add("vda", content)
	if err := src.Take("one"); err != nil {
		t.Fatal(err)
	}
	snap := src.snaps["one"]
	snap.created = snap.created.Add(-time.Hour)
	image := snap.images["vda"]
	image.writable = writable
	_, dir := mountFake(t, src)
	return image, filepath.Join(dir, "snapshots/one")
}

// TestImageCopies copies an image with holes by the tools that people use. Each
// copy is equal, and the sparse ones have no more blocks than the image.
func TestImageCopies(t *testing.T) {
	need(t, "rsync")
	content := holey(t, 5<<20+512)
	image, dir := mountImage(t, content, false)
	allocated, _ := image.Allocated()
	tmp := t.TempDir()
	if err := os.WriteFile(tmp+"/want", content, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name, command string
		sparse        bool
	}{
		{"cat", "cat vda.img > $tmp/got", false},
		{"cp", "cp vda.img $tmp/got", true},
		{"cp -a", "cp -a vda.img $tmp/got", true},
		{"cp --sparse=always", "cp --sparse=always vda.img $tmp/got", true},
		{"cp --sparse=never", "cp --sparse=never vda.img $tmp/got", false},
		{"dd", "dd if=vda.img of=$tmp/got bs=1M status=none", false},
		{"dd of small odd blocks", "dd if=vda.img of=$tmp/got bs=12345 status=none", false},
		{"dd of large odd blocks", "dd if=vda.img of=$tmp/got bs=3000001 iflag=fullblock status=none", false},
		{"dd direct", "dd if=vda.img of=$tmp/got bs=1M iflag=direct status=none", false},
		{"dd direct, 512 bytes", "dd if=vda.img of=$tmp/got bs=512 iflag=direct status=none", false},
		{"dd by parts", "for i in 2 0 1 3; do dd if=vda.img of=$tmp/got bs=1500k skip=$i seek=$i count=1 conv=notrunc iflag=fullblock status=none; done", false},
		{"tar -S", "tar cSf $tmp/tar vda.img && test $(stat -c %s $tmp/tar) -lt 5000000 && tar xOf $tmp/tar > $tmp/got", false},
		{"tar", "tar cf $tmp/tar vda.img && tar xOf $tmp/tar > $tmp/got", false},
		{"rsync", "rsync vda.img $tmp/got", false},
		{"rsync -S", "rsync -aS vda.img $tmp/got", true},
		{"head and tail", "(head -c 1500000 vda.img; tail -c +1500001 vda.img) > $tmp/got", false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			run(t, dir, "tmp=%s; rm -f $tmp/got; %s && cmp $tmp/want $tmp/got", tmp, tc.command)
			var st syscall.Stat_t
			if err := syscall.Stat(tmp+"/got", &st); err != nil {
				t.Fatal(err)
			}
			if got := st.Blocks * 512; tc.sparse && got > allocated+64<<10 {
				t.Errorf("the copy has %d bytes, the image %d", got, allocated)
			}
		})
	}
}

// TestImageStat shows what ls, stat and find say of an image.
func TestImageStat(t *testing.T) {
	content := make([]byte, 1<<20)
	copy(content[65536:], bytes.Repeat([]byte{1}, 8192))
	_, dir := mountImage(t, content, false)
	got := run(t, dir, "stat -c '%%A %%s %%b %%B %%o %%h %%u' vda.img; find . -links +1; find . -name '*.img' -size -2049 -type f; tmp=%s; cp -p vda.img $tmp && stat -c %%a $tmp/vda.img", t.TempDir())
	want := fmt.Sprintf("-rw------- 1048576 16 512 1048576 1 %d\n./vda.img\n600\n", os.Getuid())
	if got != want {
		t.Errorf("stat, find\n got %s\nwant %s", got, want)
	}
}

// TestImageHoles asks for data and holes from every kind of offset.
func TestImageHoles(t *testing.T) {
	const size = 64 << 10
	content := make([]byte, size)
	copy(content[8192:], bytes.Repeat([]byte{1}, 4096))
	_, dir := mountImage(t, content, false)
	f := open(t, filepath.Join(dir, "vda.img"))
	for _, tc := range []struct {
		name   string
		off    int64
		whence int
		want   int64 // -1: ENXIO
	}{
		{"data from the start", 0, unix.SEEK_DATA, 8192},
		{"data inside data", 9000, unix.SEEK_DATA, 9000},
		{"no data behind", 12288, unix.SEEK_DATA, -1},
		{"data at the end", size, unix.SEEK_DATA, -1},
		{"data beyond the end", size + 1, unix.SEEK_DATA, -1},
		{"hole from the start", 0, unix.SEEK_HOLE, 0},
		{"hole from data", 8192, unix.SEEK_HOLE, 12288},
		{"hole inside a hole", 20000, unix.SEEK_HOLE, 20000},
		{"hole at the end", size, unix.SEEK_HOLE, -1},
		{"end", 0, io.SeekEnd, size},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got, err := unix.Seek(int(f.Fd()), tc.off, tc.whence)
			if err == unix.ENXIO {
				got, err = -1, nil
			}
			if got != tc.want || err != nil {
				t.Errorf("lseek(%d)\n got %d, %v\nwant %d", tc.off, got, err, tc.want)
			}
		})
	}
}

// TestImageMapped maps an image, privately and shared.
func TestImageMapped(t *testing.T) {
	need(t, "/usr/bin/python3", "md5sum")
	content := holey(t, 4<<20+512)
	_, dir := mountImage(t, content, false)
	got := run(t, dir, `/usr/bin/python3 -c '
import mmap, hashlib
f = open("vda.img", "rb")
for flags in (mmap.MAP_PRIVATE, mmap.MAP_SHARED):
    print(hashlib.md5(mmap.mmap(f.fileno(), 0, flags, mmap.PROT_READ)).hexdigest())
'; md5sum < vda.img | cut -d' ' -f1`)
	if sums := strings.Fields(got); len(sums) != 3 || sums[0] != sums[1] || sums[1] != sums[2] {
		t.Errorf("checksums of private and shared mapping, and of read\n got %v\nwant three equal ones", sums)
	}
}

// TestImageInParallel reads one image from many files at once.
func TestImageInParallel(t *testing.T) {
	content := holey(t, 4<<20)
	_, dir := mountImage(t, content, false)
	done := make(chan error)
	const readers = 8
	for i := range readers {
		go func() {
			done <- func() error {
				f, err := os.Open(filepath.Join(dir, "vda.img"))
				if err != nil {
					return err
				}
				defer f.Close()
				rng := rand.New(rand.NewPCG(*seed, uint64(i)))
				for range 40 {
					off, n := rng.IntN(len(content)), rng.IntN(2<<20)
					p := make([]byte, n)
					n, err := f.ReadAt(p, int64(off))
					if err != nil && err != io.EOF {
						return err
					}
					if want := content[off:min(off+len(p), len(content))]; !bytes.Equal(p[:n], want) {
						return fmt.Errorf("read of %d at %d: %d bytes, want %d, or they differ", len(p), off, n, len(want))
					}
				}
				return nil
			}()
		}()
	}
	for range readers {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}

// TestImageReadOnly tries to write to an image that is not writable.
func TestImageReadOnly(t *testing.T) {
	content := bytes.Repeat([]byte{7}, 8192)
	image, dir := mountImage(t, content, false)
	name := filepath.Join(dir, "vda.img")
	for _, flags := range []int{os.O_WRONLY, os.O_RDWR, os.O_WRONLY | os.O_TRUNC, os.O_WRONLY | os.O_APPEND, os.O_WRONLY | os.O_CREATE} {
		_, err := os.OpenFile(name, flags, 0)
		wantErrno(t, fmt.Sprintf("open with flags %#x", flags), err, syscall.EROFS)
	}
	wantErrno(t, "truncate", os.Truncate(name, 0), syscall.EROFS)
	if err := open(t, name).Sync(); err != nil {
		t.Errorf("fsync: %v", err)
	}
	if !bytes.Equal(image.content, content) {
		t.Error("the image has changed")
	}
}

// TestImageWritable writes to a writable image in all ways.
func TestImageWritable(t *testing.T) {
	const size = 1 << 20
	image, dir := mountImage(t, bytes.Repeat([]byte{7}, size), true)
	name := filepath.Join(dir, "vda.img")
	f, err := os.OpenFile(name, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	fd := int(f.Fd())
	const keep = unix.FALLOC_FL_KEEP_SIZE
	model := bytes.Clone(image.content)
	changed := time.Time{}
	for _, tc := range []struct {
		name    string
		do      func() error
		off, to int  // of what changes
		b       byte // to this
		want    error
	}{
		{"write", func() error { _, err := f.WriteAt([]byte("aaa"), 5000); return err }, 5000, 5003, 'a', nil},
		{"large write", func() error { _, err := f.WriteAt(bytes.Repeat([]byte{'b'}, 300000), 100001); return err }, 100001, 400001, 'b', nil},
		{"write over the end", func() error { _, err := f.WriteAt(bytes.Repeat([]byte{'c'}, 2000), size-1000); return err }, size - 1000, size, 'c', syscall.ENOSPC},
		{"write beyond the end", func() error { _, err := f.WriteAt([]byte{'d'}, size); return err }, 0, 0, 0, syscall.ENOSPC},
		{"punch", func() error { return unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|keep, 200000, 70000) }, 200000, 270000, 0, nil},
		{"zero", func() error { return unix.Fallocate(fd, unix.FALLOC_FL_ZERO_RANGE, 300000, 5) }, 300000, 300005, 0, nil},
		{"zero keeping the size", func() error { return unix.Fallocate(fd, unix.FALLOC_FL_ZERO_RANGE|keep, size-100, 200) }, size - 100, size, 0, nil},
		{"zero over the end", func() error { return unix.Fallocate(fd, unix.FALLOC_FL_ZERO_RANGE, size-100, 200) }, 0, 0, 0, syscall.ENOSPC},
		{"punch beyond the end", func() error { return unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|keep, size+5, 200) }, 0, 0, 0, nil},
		{"reserve space", func() error { return unix.Fallocate(fd, 0, 0, 4096) }, 0, 0, 0, syscall.EOPNOTSUPP},
		{"truncate to its size", func() error { return f.Truncate(size) }, 0, 0, 0, nil},
		{"truncate", func() error { return f.Truncate(0) }, 0, 0, 0, syscall.EPERM},
		{"grow", func() error { return f.Truncate(size + 512) }, 0, 0, 0, syscall.EPERM},
		{"open with O_TRUNC", func() error { _, err := os.OpenFile(name, os.O_RDWR|os.O_TRUNC, 0); return err }, 0, 0, 0, syscall.EPERM},
	} {
		err := tc.do()
		if !errors.Is(err, tc.want) {
			t.Errorf("%s\n got %v\nwant %v", tc.name, err, tc.want)
		}
		for i := tc.off; i < tc.to; i++ {
			model[i] = tc.b
		}
		if got, err := os.ReadFile(name); err != nil || !bytes.Equal(got, model) {
			t.Fatalf("after %s: error %v, or the image differs from the model", tc.name, err)
		}
		fi, err := f.Stat()
		if err != nil || tc.to > tc.off && fi.ModTime().Equal(changed) {
			t.Errorf("after %s: error %v, or the time of the last change is as before", tc.name, err)
		}
		changed = fi.ModTime()
	}
	if err := f.Sync(); err != nil || image.synced.Load() == 0 {
		t.Errorf("fsync: %v, synced %d times", err, image.synced.Load())
	}
}

// TestImageMappedWritable writes to an image through a shared mapping.
func TestImageMappedWritable(t *testing.T) {
	need(t, "/usr/bin/python3")
	image, dir := mountImage(t, bytes.Repeat([]byte{7}, 1<<20), true)
	run(t, dir, `/usr/bin/python3 -c '
import mmap
f = open("vda.img", "r+b")
m = mmap.mmap(f.fileno(), 0)
m[5000:5010] = b"x" * 10
m.flush()
m[900000] = 121
m.close()
f.close()'`)
	image.mu.RLock()
	defer image.mu.RUnlock()
	if got := string(image.content[4999:5011]); got != "\x07xxxxxxxxxx\x07" {
		t.Errorf("what was flushed\n got %q", got)
	}
	if got := image.content[900000]; got != 'y' {
		t.Errorf("what was closed\n got %q\nwant %q", got, 'y')
	}
}

// TestImageLoop attaches images to loop devices.
func TestImageLoop(t *testing.T) {
	needRoot(t, "only root can attach loop devices")
	need(t, "losetup", "blkdiscard", "/dev/loop-control")
	for _, direct := range []string{"off", "on"} {
		for _, writable := range []bool{false, true} {
			t.Run(fmt.Sprintf("direct-io %s, writable %v", direct, writable), func(t *testing.T) {
				content := holey(t, 8<<20)
				image, dir := mountImage(t, content, writable)
				tmp := t.TempDir()
				if err := os.WriteFile(tmp+"/want", content, 0o600); err != nil {
					t.Fatal(err)
				}
				ro := "-r"
				if writable {
					ro = ""
				}
				loop := strings.TrimSpace(run(t, dir, "losetup -f --show %s --direct-io=%s vda.img", ro, direct))
				t.Cleanup(func() { run(t, "/", "losetup -d %s", loop) })
				run(t, "/", "cmp %s %s/want && dd if=%s bs=1M iflag=direct status=none | cmp - %s/want", loop, tmp, loop, tmp)
				if !writable {
					if _, _, err := try(t, "/", "dd if=/dev/zero of=%s bs=4096 count=1 oflag=direct", loop); err == nil {
						t.Error("a write to a read-only loop device succeeds")
					}
					return
				}
				run(t, "/", "head -c 65536 /dev/zero | tr '\\0' x | dd of=%s bs=4096 seek=16 oflag=direct conv=fsync status=none", loop)
				run(t, "/", "blkdiscard -o 1048576 -l 1048576 %s && blkdiscard -z -o 3145728 -l 65536 %s", loop, loop)
				copy(content[65536:], bytes.Repeat([]byte{'x'}, 65536))
				clear(content[1<<20 : 2<<20])
				clear(content[3<<20 : 3<<20+65536])
				image.mu.RLock()
				defer image.mu.RUnlock()
				if !bytes.Equal(image.content, content) {
					t.Error("the image differs from what was written")
				}
				if image.synced.Load() == 0 {
					t.Error("a flush of the loop device did not sync the image")
				}
			})
		}
	}
}

// TestTreeTools runs over the whole tree, under changes, what people use to look
// at trees and to copy them: no complaint, and equal copies.
func TestTreeTools(t *testing.T) {
	need(t, "rsync")
	src := newFakeSource()
	vda := src.add("vda", holey(t, 1<<20))
	src.add("vdb", make([]byte, 4096))
	src.Take("one")
	src.Take("two")
	_, dir := mountFake(t, src)

	stop := make(chan struct{})
	wrote := make(chan struct{})
	pace := time.NewTicker(100 * time.Microsecond) // the tree needs a processor, too
	defer pace.Stop()
	go func() {
		defer close(wrote)
		for i := int64(0); ; i++ {
			select {
			case <-stop:
				return
			case <-pace.C:
				vda.write([]byte{byte(i)}, i*66000%(1<<20))
			}
		}
	}()
	for i, command := range []string{
		"find . -ls > /dev/null",
		"ls -lR > /dev/null",
		"du -a > /dev/null",
		"cat $(find . -type f) > /dev/null",
		"find . -type f -exec md5sum {} + > /dev/null",
		"cp -a . $tmp/copy",
		"cp -r . $tmp/copy",
		"tar cf $tmp/tar . && mkdir $tmp/copy && tar xf $tmp/tar -C $tmp/copy",
		"rsync -a ./ $tmp/copy",
		"rsync -aHAXS ./ $tmp/copy",
	} {
		tmp := t.TempDir()
		out, stderr, err := try(t, dir, "tmp=%s; %s", tmp, command)
		if err != nil || stderr != "" {
			t.Errorf("%s: %v\n%s%s", command, err, out, stderr)
		}
		if i >= 5 {
			if out, _, err := try(t, dir, "diff -r snapshots %s/copy/snapshots", tmp); err != nil {
				t.Errorf("%s: the copy differs: %s", command, out)
			}
		}
	}
	close(stop)
	<-wrote
}
