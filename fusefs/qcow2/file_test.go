package qcow2

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"strings"
	"testing"
	"time"
)

var seed = flag.Uint64("seed", uint64(time.Now().UnixNano()), "seed of the random tests")

// free is the memory of tests that do not count it.
func free(int64) error { return nil }

// randomRuns returns disjoint runs of sectors, many of whole blocks, and the image
// over which they are: zero in the zero runs, and not elsewhere.
func randomRuns(rng *rand.Rand, size int64) ([]Run, []byte) {
	image := bytes.Repeat([]byte{1 + byte(rng.IntN(255))}, int(size))
	for off := int64(0); off < size; off += 512 {
		binary.BigEndian.PutUint64(image[off:], uint64(off)+1)
	}
	longest := 1 + size/512/(1+rng.Int64N(200))
	var runs []Run
	for off := int64(0); off < size; {
		end := off + 512*(1+rng.Int64N(longest))
		if rng.IntN(3) > 0 {
			end = (end + 4095) &^ 4095
		}
		end = min(end, size)
		if k := kind(rng.IntN(3)); k != absent {
			runs = append(runs, Run{off, end - off, k == zero})
			if k == zero {
				clear(image[off:end])
			}
		}
		off = end
	}
	return runs, image
}

// wantKinds returns by the words of the documentation what each cluster of size
// bytes is to be.
func wantKinds(runs []Run, size, cluster int64) []kind {
	kinds := make([]kind, (size+cluster-1)/cluster)
	for _, r := range runs {
		for c := r.Off / cluster; c*cluster < r.Off+r.N; c++ {
			kinds[c] = data
			if r.Zero && r.Off <= c*cluster && r.Off+r.N >= min(c*cluster+cluster, size) {
				kinds[c] = zero
			}
		}
	}
	return kinds
}

// TestRandom makes files of random runs, decodes them, and compares what they hold
// with the image and a backing file.
func TestRandom(t *testing.T) {
	t.Logf("repeat with -seed=%d", *seed)
	rng := rand.New(rand.NewPCG(*seed, 0))
	for range 150 {
		size := 512 * (1 + rng.Int64N([]int64{1, 8, 100, 5000, 10000}[rng.IntN(5)]))
		block := int64(4096) << rng.IntN(5)
		runs, image := randomRuns(rng, size)
		d := Disk{Size: size, Block: block}
		backing := make([]byte, size)
		if rng.IntN(2) == 0 {
			d.Backing = "vda@7-9b2f6c8e-35a7-4a54-8e8f-3f1b5a4c7d60"
			for i := range backing {
				backing[i] = 0xff
			}
		}
		f, edition, err := d.Make(bytes.NewReader(image), each(runs...), free)
		if err != nil {
			t.Fatal(err)
		}
		if measured, err := d.Measure(each(runs...)); err != nil || measured != edition || edition.Size != f.at.end {
			t.Fatalf("Measure of %d bytes, block %d, runs %v\n got %v, %v\nwant %v of %d bytes", size, block, runs, measured, err, edition, f.at.end)
		}
		b, err := content(f)
		if err != nil {
			t.Fatal(err)
		}
		dec, err := decode(b)
		if err != nil {
			t.Fatalf("%d bytes, block %d, runs %v: %v", size, block, runs, err)
		}
		if dec.size != size || dec.cluster != block || dec.backing != d.Backing {
			t.Errorf("size, cluster and backing file\n got %d %d %q\nwant %d %d %q", dec.size, dec.cluster, dec.backing, size, block, d.Backing)
		}
		checkKinds(t, dec, wantKinds(runs, size, block))
		want := bytes.Clone(backing)
		for c, k := range wantKinds(runs, size, block) {
			if off := int64(c) * block; k != absent {
				copy(want[off:], image[off:min(off+block, size)])
			}
		}
		if !bytes.Equal(dec.read(backing), want) {
			t.Fatalf("%d bytes, block %d, runs %v: the content differs", size, block, runs)
		}
		checkPieces(t, rng, f, b)
	}
}

func checkKinds(t *testing.T, d *decoded, want []kind) {
	t.Helper()
	for c, entry := range d.entries {
		got := data
		if entry <= 1 {
			got = []kind{absent, zero}[entry]
		}
		if got != want[c] {
			t.Fatalf("kind of cluster %d of %d\n got %d\nwant %d", c, len(want), got, want[c])
		}
	}
}

// checkPieces reads pieces of a file that holds b.
func checkPieces(t *testing.T, rng *rand.Rand, f *File, b []byte) {
	t.Helper()
	for range 10 {
		off := rng.Int64N(f.at.end + 10)
		p := bytes.Repeat([]byte{0xaa}, rng.IntN(len(b)+10))
		if rng.IntN(2) == 0 {
			p = p[:min(len(p), 1+rng.IntN(50))]
		}
		want := b[min(off, int64(len(b))):]
		want = want[:min(len(want), len(p))]
		var wantErr error
		if len(want) < len(p) {
			wantErr = io.EOF
		}
		n, err := f.ReadAt(p, off)
		if n != len(want) || err != wantErr || !bytes.Equal(p[:n], want) {
			t.Fatalf("ReadAt of %d bytes at %d of %d\n got %d, %v, equal %v\nwant %d, %v", len(p), off, len(b), n, err, bytes.Equal(p[:n], want), len(want), wantErr)
		}
	}
}

// TestSum tells files of one size apart, and finds equal ones equal.
func TestSum(t *testing.T) {
	d := Disk{Size: 1 << 20, Block: 4096}
	sum := func(runs ...Run) Edition {
		e, err := d.Measure(each(runs...))
		if err != nil {
			t.Fatal(err)
		}
		return e
	}
	one := sum(Run{0, 8192, false})
	if a, b := sum(Run{0, 4096, false}, Run{4096, 4096, true}), sum(Run{0, 4096, true}, Run{4096, 4096, false}); a == b {
		t.Errorf("data and zero, zero and data: both %v", a)
	}
	if same := sum(Run{0, 4096, false}, Run{4096, 4096, false}); same != one {
		t.Errorf("the same clusters in two runs\n got %v\nwant %v", same, one)
	}
	for name, other := range map[string]Edition{
		"elsewhere": sum(Run{4096, 8192, false}),
		"apart":     sum(Run{0, 4096, false}, Run{8192, 4096, false}),
		"and zero":  sum(Run{0, 8192, false}, Run{8192, 4096, true}),
	} {
		if other.Size != one.Size || other.Sum == one.Sum {
			t.Errorf("%s: %v beside %v, want the same size and another sum", name, other, one)
		}
	}
}

// TestErrors fails where runs, memory or image fail.
func TestErrors(t *testing.T) {
	broken := errors.New("broken")
	d := Disk{Size: 1 << 20, Block: 4096}
	failing := func(yield func(Run, error) bool) { yield(Run{}, broken) }
	if _, err := d.Measure(failing); err != broken {
		t.Errorf("Measure\n got %v\nwant %v", err, broken)
	}
	if _, _, err := d.Make(nil, failing, free); err != broken {
		t.Errorf("Make\n got %v\nwant %v", err, broken)
	}
	runs := each(Run{0, 4096, false}, Run{4096, 4096, true})
	for k := 0; ; k++ { // at the k-th time
		left := k
		f, _, err := d.Make(bytes.NewReader(make([]byte, d.Size)), runs, func(int64) error {
			if left--; left < 0 {
				return broken
			}
			return nil
		})
		if err == nil {
			if f == nil || k != 3 {
				t.Errorf("memory is asked for %d times, want 3", k)
			}
			break
		}
		if err != broken || f != nil {
			t.Errorf("Make without memory\n got %v, %v\nwant %v", f, err, broken)
		}
	}

	for name, image := range map[string]io.ReaderAt{
		"failing": failingReader{broken},
		"short":   bytes.NewReader(make([]byte, 100)),
	} {
		f, _, err := d.Make(image, runs, free)
		if err != nil {
			t.Fatal(err)
		}
		p := make([]byte, f.at.end)
		n, err := f.ReadAt(p, 0)
		if int64(n) != f.at.end-4096 || err == nil || err == io.EOF {
			t.Errorf("read of a %s image\n got %d, %v\nwant %d and an error", name, n, err, f.at.end-4096)
		}
	}
}

type failingReader struct{ err error }

func (r failingReader) ReadAt([]byte, int64) (int, error) { return 0, r.err }

// TestGolden guards the bytes of the format: what was copied yesterday is read by
// others for years.
func TestGolden(t *testing.T) {
	image := bytes.NewReader([]byte(strings.Repeat("blksnap\n", 2*4096/8) + strings.Repeat("the end\n", 512/8)))
	for _, tc := range []struct {
		name    string
		backing string
		runs    []Run
	}{
		{"full", "", []Run{{0, 4096, false}, {8192, 512, false}}},
		{"increment", "vda@7-9b2f6c8e-35a7-4a54-8e8f-3f1b5a4c7d60", []Run{{4096, 4096, true}, {8192, 512, false}}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f, _, err := Disk{8704, 4096, tc.backing}.Make(image, each(tc.runs...), free)
			if err != nil {
				t.Fatal(err)
			}
			b, err := content(f)
			if err != nil {
				t.Fatal(err)
			}
			want, err := os.ReadFile("testdata/" + tc.name + ".txt")
			if err != nil {
				t.Fatal(err)
			}
			if got := dump(b); got != string(want) {
				t.Errorf("file\n got\n%s\nwant\n%s", got, want)
			}
		})
	}
}

// dump returns b as hexdump -C prints it: repeated lines once, its length at the
// end.
func dump(b []byte) string {
	var out strings.Builder
	last := ""
	for line := range strings.Lines(hex.Dump(b)) {
		switch bytes := line[9:]; {
		case bytes != last:
			out.WriteString(line)
			last = bytes
		case !strings.HasSuffix(out.String(), "*\n"):
			out.WriteString("*\n")
		}
	}
	fmt.Fprintf(&out, "%08x\n", len(b))
	return out.String()
}
