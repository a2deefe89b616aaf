package fusefs

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"iter"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// mountIncrement mounts a tree with the snapshots "old" (number 1) and "new"
// (number 2) of the device "vda", between which data was written, zeroed, and
// written as it was before. It returns the newer image and the directory
// snapshots.
func mountIncrement(t *testing.T, size int, block int64) (*fakeSource, *fakeImage, string) {
	t.Helper()
	src := newFakeSource()
	content := holey(t, size)
	vda := src.add("vda", content)
	vda.set(&fakeChanges{device: int64(size), block: block, generation: "9b2f6c8e", m: make([]byte, (size+int(block)-1)/int(block))})
	src.Take("old")
	rng := rand.New(rand.NewPCG(*seed, 2))
	for range 30 {
		off := rng.IntN(size)
		n := min(1+rng.IntN(40000), size-off)
		switch rng.IntN(3) {
		case 0:
			vda.write(bytes.Repeat([]byte{byte(rng.Uint32() | 1)}, n), int64(off))
		case 1:
			vda.write(make([]byte, n), int64(off))
		default:
			vda.write(content[off:off+n], int64(off))
		}
	}
	src.Take("new")
	for _, name := range []string{"old", "new"} {
		image := src.snaps[name].images["vda"]
		image.changes.content = image.content
	}
	_, dir := mountFake(t, src)
	return src, src.snaps["new"].images["vda"], filepath.Join(dir, "snapshots")
}

// TestQCOW2Names looks up what is and what is not there.
func TestQCOW2Names(t *testing.T) {
	src := newFakeSource()
	src.add("vda", make([]byte, 8192)).set(&fakeChanges{device: 8192, block: 4096, generation: "g", base: 3, number: 5, m: make([]byte, 2)})
	src.taken = 5
	for _, name := range []string{"six", "seven"} {
		src.Take(name)
	}
	_, dir := mountFake(t, src)
	snap := filepath.Join(dir, "snapshots/seven")

	want := ".\n..\ncreated\nstate\nvda.cbt\nvda.img\nvda.qcow2\nvda.state\nvda@6.qcow2\nvda@7.qcow2\n"
	if got := run(t, snap, "LC_ALL=C ls -a"); got != want {
		t.Errorf("ls\n got %q\nwant %q", got, want)
	}
	for name, there := range map[string]bool{
		"vda.qcow2": true, "vda@3.qcow2": true, "vda@5.qcow2": true, "vda@6.qcow2": true, "vda@7.qcow2": true,
		"vda@2.qcow2": false, "vda@8.qcow2": false, "vda@06.qcow2": false, "vda@all.qcow2": false, "vda@.qcow2": false,
		"vda@-1.qcow2": false, "vda@6.img": false, "vda@6": false, "vda@6.qcow2.qcow2": false, "@6.qcow2": false,
		"vdb@6.qcow2": false, "vdb.qcow2": false, "vda@vda@6.qcow2": false, ".qcow2": false, "vda@99999999999999999999.qcow2": false,
	} {
		_, err := os.Stat(filepath.Join(snap, name))
		if there != (err == nil) || err != nil && !errors.Is(err, syscall.ENOENT) {
			t.Errorf("stat of %s\n got %v\nwant found %v", name, err, there)
		}
	}
	image := src.snaps["seven"].images["vda"]
	image.mu.Lock()
	image.changes = &fakeChanges{device: 8192, block: 4096, base: 6, number: 7, m: make([]byte, 2)}
	image.mu.Unlock()
	_, err := os.Stat(snap + "/vda@5.qcow2")
	wantErrno(t, "stat since before the base", err, syscall.ENOENT)
	_, err = os.OpenFile(snap+"/vda.qcow2", os.O_RDWR, 0)
	wantErrno(t, "open for writing", err, syscall.EROFS)
}

// lostChanges have lost what changed, although the numbers are in range.
type lostChanges struct{ *fakeChanges }

func (lostChanges) Since(uint64) (iter.Seq2[Run, error], bool) { return nil, false }

// lostImage is an image with such changes.
type lostImage struct{ *fakeImage }

func (im lostImage) Changes() Changes { return lostChanges{im.changes} }

// oneImage is a snapshot, and a source with that snapshot "one" only.
type oneImage struct {
	*fakeSource
	fakeSnapshot
	image Image
}

func (s *oneImage) Snapshots() []string                   { return []string{"one"} }
func (s *oneImage) Snapshot(name string) (Snapshot, bool) { return s, name == "one" }
func (s *oneImage) Images() []string                      { return []string{"vda"} }
func (s *oneImage) Image(device string) (Image, bool)     { return s.image, device == "vda" }

// TestQCOW2Lost looks up an increment where since/NUM cannot be opened.
func TestQCOW2Lost(t *testing.T) {
	image := &fakeImage{content: make([]byte, 4096), changes: &fakeChanges{device: 4096, block: 4096, number: 2, m: make([]byte, 1)}}
	_, dir := mountSource(t, &oneImage{fakeSource: newFakeSource(), image: lostImage{image}})
	_, err := os.ReadFile(dir + "/snapshots/one/vda.cbt/since/1")
	wantErrno(t, "read of since/1", err, syscall.ENOENT)
	fd, err := unix.Open(dir+"/snapshots/one/vda@1.qcow2", unix.O_PATH, 0) // a lookup, no more
	if err == nil {
		unix.Close(fd)
	}
	wantErrno(t, "lookup of the increment", err, syscall.ENOENT)
}

// TestQCOW2Copies copies files by the tools that people use.
func TestQCOW2Copies(t *testing.T) {
	need(t, "rsync")
	_, _, dir := mountIncrement(t, 5<<20+512, 64<<10)
	tmp := t.TempDir()
	run(t, dir+"/new", "cat vda.qcow2 > %s/vda.qcow2; cat vda@1.qcow2 > %s/vda@1.qcow2", tmp, tmp)
	for _, command := range []string{
		"cp $f $tmp/got",
		"cp -p --sparse=always $f $tmp/got",
		"dd if=$f of=$tmp/got bs=12345 status=none",
		"dd if=$f of=$tmp/got bs=3000001 iflag=fullblock status=none",
		"dd if=$f of=$tmp/got bs=512 iflag=direct status=none",
		"for i in 2 0 1 3; do dd if=$f of=$tmp/got bs=1999999 skip=$i seek=$i count=1 conv=notrunc iflag=fullblock status=none; done",
		"tar cSf $tmp/tar $f && tar xOf $tmp/tar > $tmp/got",
		"rsync -aS $f $tmp/got",
	} {
		got := run(t, dir+"/new", `tmp=%s; for f in vda.qcow2 vda@1.qcow2; do
			rm -f $tmp/got; %s; cmp $tmp/got $tmp/$f && stat -c '%%s %%a' $f && stat -c '%%s 600' $tmp/got; done`, tmp, command)
		if lines := strings.Split(got, "\n"); len(lines) != 5 || lines[0] != lines[1] || lines[2] != lines[3] {
			t.Errorf("%s: size and mode of both files, each beside what was read of it\n got %q", command, lines)
		}
	}
}

// TestQCOW2Backup lets QEMU compare copies with the image.
func TestQCOW2Backup(t *testing.T) {
	need(t, "qemu-img")
	for _, block := range []int64{4 << 10, 64 << 10, 16 << 20} {
		t.Run(fmt.Sprint("block ", block), func(t *testing.T) {
			_, _, dir := mountIncrement(t, 5<<20+512, block)
			run(t, dir+"/new", `set -e; tmp=%s
				cp vda.qcow2 $tmp/full
				qemu-img check -q $tmp/full
				qemu-img compare -q -f qcow2 -F raw $tmp/full vda.img
				cp vda@1.qcow2 $tmp/increment
				qemu-img compare -q -f qcow2 -F raw $tmp/increment vda.img 2>&1 | grep -q "vda@1-9b2f6c8e.: No such file"
				qemu-img rebase -u -f qcow2 -F raw -b $PWD/../old/vda.img $tmp/increment
				qemu-img check -q $tmp/increment
				qemu-img compare -q -f qcow2 -F raw $tmp/increment vda.img`, t.TempDir())
		})
	}
}

// TestQCOW2InPlace lets programs read files where they are.
func TestQCOW2InPlace(t *testing.T) {
	need(t, "qemu-img", "nbdkit", "nbdcopy")
	_, _, dir := mountIncrement(t, 5<<20+512, 64<<10)
	tmp := t.TempDir()
	run(t, dir+"/new", `qemu-img check -q vda.qcow2 && qemu-img compare -q vda.qcow2 vda.img
		nbdkit --run 'nbdcopy "$uri" %s/nbd' file vda.qcow2 && cmp %s/nbd vda.qcow2
		qemu-img compare -q 'json:{"driver":"qcow2","file":{"driver":"file","filename":"vda@1.qcow2"},"backing":{"driver":"raw","file":{"driver":"file","filename":"../old/vda.img"}}}' vda.img`, tmp, tmp)
}

// TestQCOW2InParallel reads one file by many readers who open and close it.
func TestQCOW2InParallel(t *testing.T) {
	_, _, dir := mountIncrement(t, 4<<20, 64<<10)
	name := filepath.Join(dir, "new/vda.qcow2")
	content, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error)
	const readers = 6
	for i := range readers {
		go func() {
			rng := rand.New(rand.NewPCG(*seed, uint64(i)))
			for range 10 {
				if err := readPiece(name, rng, content); err != nil {
					done <- err
					return
				}
			}
			done <- nil
		}()
	}
	for range readers {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}

// readPiece opens a file and reads a piece of it, which is to be as in content.
func readPiece(name string, rng *rand.Rand, content []byte) error {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	off := rng.IntN(len(content))
	p := make([]byte, rng.IntN(2<<20))
	n, err := f.ReadAt(p, int64(off))
	if err != nil && err != io.EOF {
		return err
	}
	if want := content[off:min(off+len(p), len(content))]; !bytes.Equal(p[:n], want) {
		return fmt.Errorf("read of %d at %d: %d bytes, want %d, or they differ", len(p), off, n, len(want))
	}
	return nil
}

// TestQCOW2InUse destroys a snapshot while one of its qcow2 files is open.
func TestQCOW2InUse(t *testing.T) {
	for _, file := range []string{"vda.qcow2", "vda@1.qcow2", "vda@2.qcow2"} {
		t.Run(file, func(t *testing.T) {
			src, image, dir := mountIncrement(t, 1<<20, 64<<10)
			f := open(t, filepath.Join(dir, "new", file))
			same := open(t, filepath.Join(dir, "new", file))
			wantErrno(t, "destroy while it is open twice", src.Destroy("new"), syscall.EBUSY)
			same.Close()
			p := make([]byte, 512)
			if _, err := f.ReadAt(p, 0); err != nil {
				t.Errorf("read of the second: %v", err)
			}
			wantErrno(t, "destroy while it is open", src.Destroy("new"), syscall.EBUSY)

			src.force("new")
			size, err := f.Seek(0, io.SeekEnd)
			if err != nil {
				t.Fatal(err)
			}
			for _, off := range []int64{0, 65536, size - 512} {
				_, err := f.ReadAt(p, off)
				wantErrno(t, fmt.Sprint("read at ", off, " of a destroyed image"), err, syscall.EIO)
			}
			f.Close()
			eventually(t, "the image is released", func() error {
				if n := image.users.Load(); n != 0 {
					return fmt.Errorf("%d use it", n)
				}
				return nil
			})
		})
	}
}

// TestQCOW2Memory fills the budget: an open fails, and what was taken is given
// back at the last close.
func TestQCOW2Memory(t *testing.T) {
	src, image, dir := mountIncrement(t, 1<<20, 64<<10)
	used := &src.tree.contents.used
	name := filepath.Join(dir, "new/vda.qcow2")
	used.Store(contentLimit - 200)
	_, err := os.Open(name)
	wantErrno(t, "open beyond the limit of memory", err, syscall.ENOMEM)
	if got := used.Load(); got != contentLimit-200 {
		t.Errorf("budget after a refused open\n got %d\nwant %d", got, contentLimit-200)
	}
	if n := image.users.Load(); n != 0 {
		t.Errorf("the image is in use %d times after a refused open", n)
	}
	used.Store(0)
	first, second := open(t, name), open(t, name)
	held := used.Load()
	if held <= 0 {
		t.Errorf("an open file holds %d bytes", held)
	}
	first.Close()
	second.Close()
	eventually(t, "the memory is given back", func() error {
		if n := used.Load(); n != 0 {
			return fmt.Errorf("%d bytes of %d are held", n, held)
		}
		return nil
	})
}

// TestQCOW2Marked marks a frozen map, as a write to an older writable image does:
// whoever has an increment open goes on with it, and whoever opens it then has
// what is marked.
func TestQCOW2Marked(t *testing.T) {
	src := newFakeSource()
	src.add("vda", bytes.Repeat([]byte{7}, 1<<20))
	src.Take("old")
	src.Take("new")
	_, dir := mountFake(t, src)
	name := filepath.Join(dir, "snapshots/new/vda@1.qcow2")
	size := func() int64 {
		t.Helper()
		fi, err := os.Stat(name)
		if err != nil {
			t.Fatal(err)
		}
		return fi.Size()
	}
	empty := size()
	before := open(t, name)
	src.snaps["new"].images["vda"].mark(3)
	after := open(t, name)

	for _, tc := range []struct {
		name string
		f    *os.File
		want int64
	}{
		{"open before", before, empty},
		{"open after", after, empty + 2*65536}, // a table and a data cluster
	} {
		fi, err := tc.f.Stat()
		if err != nil || fi.Size() != tc.want {
			t.Errorf("%s: size\n got %d, %v\nwant %d", tc.name, fi.Size(), err, tc.want)
		}
		b, err := io.ReadAll(tc.f)
		if err != nil || int64(len(b)) != tc.want {
			t.Errorf("%s: read\n got %d bytes, %v\nwant %d", tc.name, len(b), err, tc.want)
		}
	}
	if got := size(); got != empty+2*65536 {
		t.Errorf("size by name\n got %d\nwant %d", got, empty+2*65536)
	}
	before.Close()
	after.Close()
	src.snaps["new"].images["vda"].mark(5)
	if got := size(); got != empty+3*65536 {
		t.Errorf("size of the closed file\n got %d\nwant %d", got, empty+3*65536)
	}
}

// hugeImage is all data, and reads as its own size.
type hugeImage struct {
	fakeImage
	size int64
}

func (im *hugeImage) Size() int64      { return im.size }
func (im *hugeImage) Changes() Changes { return im }

func (im *hugeImage) ReadAt(p []byte, off int64) (int, error) {
	for i := range p {
		p[i] = byte((off+int64(i))>>9) | 1
	}
	return len(p), nil
}

func (im *hugeImage) MapSize() int64             { return im.size >> 12 }
func (im *hugeImage) BlockSize() int64           { return 4096 }
func (im *hugeImage) Generation() string         { return "g" }
func (im *hugeImage) Number() uint64             { return 1 }
func (im *hugeImage) Base() uint64               { return 0 }
func (im *hugeImage) Numbers() []uint64          { return nil }
func (im *hugeImage) ReadMap([]byte, int64) int  { return 0 }
func (im *hugeImage) All() iter.Seq2[Run, error] { return im.whole() }
func (im *hugeImage) whole() iter.Seq2[Run, error] {
	return func(yield func(Run, error) bool) { yield(Run{0, im.size, false}, nil) }
}

func (im *hugeImage) Since(num uint64) (iter.Seq2[Run, error], bool) { return im.whole(), num < 2 }

// TestQCOW2Huge lets QEMU read at both ends of just under 16 TiB of data, in blocks
// for which its tables would be too long.
func TestQCOW2Huge(t *testing.T) {
	need(t, "qemu-io")
	const size = 16<<40 - 512
	_, dir := mountSource(t, &oneImage{fakeSource: newFakeSource(), image: &hugeImage{size: size}})
	name := dir + "/snapshots/one/vda.qcow2"
	commands := ""
	for _, off := range []int64{0, size/2 + 256, size - 512} {
		commands += fmt.Sprintf(" -c 'read -P %d %d 512'", byte(off>>9)|1, off)
	}
	if out := run(t, "/", "qemu-io -r -f qcow2 %s %s", commands, name); strings.Contains(out, "failed") || strings.Count(out, "read 512/512") != 3 {
		t.Errorf("qemu-io%s\n%s", commands, out)
	}
	var st unix.Stat_t
	if err := unix.Stat(name, &st); err != nil || st.Size <= size || st.Blocks != st.Size/512 {
		t.Errorf("size %d, %d blocks, error %v, want more than %d, and a block for each 512", st.Size, st.Blocks, err, int64(size))
	}
}
