package cow

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/uuid"

	"blksnap/cbt"
)

// The bytes in the tests below are the formats. If one of them fails, what was left
// yesterday can no longer be read, or is read as something else: raise the version instead
// of changing the bytes.

// dump is every line of 16 bytes of b that are not all zero, with its offset.
func dump(b []byte) string {
	var lines strings.Builder
	for off := 0; off < len(b); off += 16 {
		if line := b[off:min(off+16, len(b))]; !bytes.Equal(line, zeroes[:len(line)]) {
			fmt.Fprintf(&lines, "%6d  % x\n", off, line)
		}
	}
	return lines.String()
}

// wantFile compares what is at path with a dump.
func wantFile(t *testing.T, path string, size int, want string) {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if got := dump(b); len(b) != size || got != strings.TrimPrefix(want, "\n") {
		t.Errorf("%s\n got %d bytes\n%swant %d bytes%s", filepath.Base(path), len(b), got, size, want)
	}
}

var goldenGeneration = uuid.MustParse("00112233-4455-6677-8899-aabbccddeeff")

func TestCheckpointGolden(t *testing.T) {
	mem, err := newMemory(1 << 20)
	if err != nil {
		t.Fatal(err)
	}
	defer mem.Close()
	m, err := cbt.New(mem, 1<<20, 4<<10, goldenGeneration, 300)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	m.Mark(3*4<<10, 1)
	if err := m.Prepare(); err != nil {
		t.Fatal(err)
	}
	f, err := m.Freeze()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Release()
	m.Mark(4*4<<10, 2*4<<10)
	m.Mark(255*4<<10, 1)
	view := m.View()
	defer view.Release()

	info := checkpointInfo{
		generation: view.Generation(), number: view.Number(), base: view.Base(), block: view.BlockSize(), clean: true,
		origin: identity{size: 1 << 20, dev: 0x0801, ino: 0x1234, changed: 0x1122334455667788, diskSeq: 7},
		boot:   "01234567-89ab-cdef-0123-456789abcdef",
	}
	for i := range info.origin.print {
		info.origin.print[i] = byte(0xe0 + i)
	}
	path := filepath.Join(t.TempDir(), "map")
	if err := writeCheckpoint(hostDisk{}, path, info, view); err != nil {
		t.Fatal(err)
	}
	wantFile(t, path, 548, `
     0  62 6c 6b 73 6e 61 70 4d 01 00 00 00 05 d3 24 da
    16  00 11 22 33 44 55 66 77 88 99 aa bb cc dd ee ff
    32  2d 01 00 00 00 00 00 00 2c 01 00 00 00 00 00 00
    48  00 00 10 00 00 00 00 00 00 10 00 00 00 00 00 00
    64  01 00 00 00 00 00 00 00 01 08 00 00 00 00 00 00
    80  34 12 00 00 00 00 00 00 88 77 66 55 44 33 22 11
    96  07 00 00 00 00 00 00 00 e0 e1 e2 e3 e4 e5 e6 e7
   112  e8 e9 ea eb ec ed ee ef f0 f1 f2 f3 f4 f5 f6 f7
   128  f8 f9 fa fb fc fd fe ff 30 31 32 33 34 35 36 37
   144  2d 38 39 61 62 2d 63 64 65 66 2d 30 31 32 33 2d
   160  34 35 36 37 38 39 61 62 63 64 65 66 00 00 00 00
   176  24 00 00 00 00 00 00 00 e0 26 ac 9e 00 00 00 00
   512  03 00 00 00 00 00 00 00 03 00 00 00 00 00 00 00
   528  01 02 02 ff 00 00 00 00 00 00 00 01 00 00 00 00
   544  00 00 00 02
`)
	c, err := openCheckpoint(hostDisk{}, path)
	if err != nil {
		t.Fatal(err)
	}
	defer c.file.Close()
	info.length, info.sum = c.length, c.sum
	if c.checkpointInfo != info {
		t.Errorf("it is read as\n got %+v\nwant %+v", c.checkpointInfo, info)
	}
}

func TestRegionsGolden(t *testing.T) {
	path := filepath.Join(t.TempDir(), "regions")
	st := regionsState{size: 5000 * region, generation: goldenGeneration, number: 300, lease: 0x1122334455667788}
	r, err := createRegions(hostDisk{}, path, st)
	if err != nil {
		t.Fatal(err)
	}
	defer r.file.Close()
	for _, i := range []int64{0, 9, 4999} {
		if err := r.add(i*region, 1); err != nil {
			t.Fatal(err)
		}
	}
	r.begin()
	r.note(9*region, 1)
	if err := r.drop(st.generation, func() bool { return true }); err != nil {
		t.Fatal(err)
	}
	wantFile(t, path, 6144, `
     0  62 6c 6b 73 6e 61 70 52 01 00 00 00 94 98 a6 3d
    16  02 00 00 00 00 00 00 00 00 00 00 20 4e 00 00 00
    32  00 11 22 33 44 55 66 77 88 99 aa bb cc dd ee ff
    48  2c 01 00 00 00 00 00 00 88 77 66 55 44 33 22 11
    64  01 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00
   512  62 6c 6b 73 6e 61 70 52 01 00 00 00 69 96 0d 75
   528  01 00 00 00 00 00 00 00 00 00 00 20 4e 00 00 00
   544  00 11 22 33 44 55 66 77 88 99 aa bb cc dd ee ff
   560  2c 01 00 00 00 00 00 00 88 77 66 55 44 33 22 11
  4096  01 02 00 00 00 00 00 00 00 00 00 00 00 00 00 00
  4592  00 00 00 00 00 00 00 00 00 00 00 00 6e 0f 99 25
  4720  00 00 00 00 80 00 00 00 00 00 00 00 00 00 00 00
  5104  00 00 00 00 00 00 00 00 00 00 00 00 c1 68 dc 2d
  5120  00 02 00 00 00 00 00 00 00 00 00 00 00 00 00 00
  5616  00 00 00 00 00 00 00 00 00 00 00 00 26 ce 1f cc
  6128  00 00 00 00 00 00 00 00 00 00 00 00 c3 a9 57 ec
`)
}

func TestLayerGolden(t *testing.T) {
	if host.Uint16([]byte{1, 0}) != 1 {
		t.Skip("the machine's byte order is another")
	}
	l, err := newLayer(t.TempDir(), layerHeader{number: 5, size: 3<<30 + 512, snapshot: 9, writable: true, most: 256, random: 0x0123456789abcdef})
	if err != nil {
		t.Fatal(err)
	}
	defer l.table.close()
	for _, at := range []struct {
		chunkNo
		word
	}{{0, makeWord(1<<40|2, 0x8001)}, {1, zeroWord}, {0xc000, makeWord(2<<40|3, allBlocks)}} {
		if err := l.table.reserve(at.chunkNo, 1); err != nil {
			t.Fatal(err)
		}
		l.table.store(at.chunkNo, at.word)
	}
	l.setCBT(301)
	l.commit()
	l.setFault(faultFailed, "why")
	l.setRollback(1)
	l.table.setSpent()
	wantFile(t, l.table.path, 65536, `
     0  62 6c 6b 73 6e 61 70 4c 02 00 00 00 f2 78 16 ff
    16  05 00 00 00 00 00 00 00 00 02 00 c0 00 00 00 00
    32  09 00 00 00 00 00 00 00 01 00 00 00 00 00 00 00
    48  00 01 00 00 00 00 00 00 ef cd ab 89 67 45 23 01
    64  2d 01 00 00 00 00 00 00 01 00 00 00 00 00 00 00
    80  02 00 00 00 00 00 00 00 03 00 00 00 00 00 00 00
    96  77 68 79 00 00 00 00 00 00 00 00 00 00 00 00 00
   608  01 00 00 00 00 00 00 00 01 00 00 00 00 00 00 00
  4096  50 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00
  4112  00 00 00 00 00 00 00 00 64 00 00 00 00 00 00 00
  5120  60 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00
  6144  01 80 02 00 00 00 b7 01 ff ff 00 00 00 00 6b 00
  6400  74 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00
  7424  ff ff 03 00 00 00 3d 02 00 00 00 00 00 00 00 00
`)
}
