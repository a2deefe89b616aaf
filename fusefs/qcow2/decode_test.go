// A reader of the format that knows nothing of how the files are made.

package qcow2

import (
	"encoding/binary"
	"fmt"
	"io"
)

// decoded is a qcow2 file as the specification reads it.
type decoded struct {
	b          []byte
	cluster    int64
	size       int64
	backing    string
	entries    []uint64 // L2 entries of all clusters of the image
	references []int    // to each cluster of the file
}

// decode reads a file and checks that everything in it is referred to once and
// has a refcount of 1.
func decode(b []byte) (*decoded, error) {
	be := binary.BigEndian
	if string(b[:4]) != "QFI\xfb" || be.Uint32(b[4:]) != 3 || be.Uint32(b[96:]) != 4 || be.Uint32(b[100:]) != 104 {
		return nil, fmt.Errorf("header is % x", b[:104])
	}
	d := &decoded{b: b, cluster: 1 << be.Uint32(b[20:]), size: int64(be.Uint64(b[24:]))}
	if int64(len(b))%d.cluster != 0 {
		return nil, fmt.Errorf("%d bytes are not whole clusters of %d", len(b), d.cluster)
	}
	d.references = make([]int, int64(len(b))/d.cluster)
	d.references[0]++
	name := be.Uint64(b[8:])
	d.backing = string(b[name : name+uint64(be.Uint32(b[16:]))])
	if d.backing == "" && name != 0 || d.backing != "" && string(b[104:115]) != "\xe2\x79\x2a\xca\x00\x00\x00\x03raw" {
		return nil, fmt.Errorf("backing file %q at %d, extension % x", d.backing, name, b[104:128])
	}

	clusters := (d.size + d.cluster - 1) / d.cluster
	perTable := d.cluster / 8
	l1Size := int64(be.Uint32(b[36:]))
	if want := (clusters + perTable - 1) / perTable; l1Size != want {
		return nil, fmt.Errorf("the L1 table has %d entries, want %d", l1Size, want)
	}
	l1 := int64(be.Uint64(b[40:]))
	d.refer(l1, l1Size*8)
	d.entries = make([]uint64, clusters)
	for i := range l1Size {
		at := be.Uint64(b[l1+i*8:])
		if at == 0 {
			continue
		}
		table, err := d.owns(at)
		if err != nil {
			return nil, fmt.Errorf("L1 entry %d: %w", i, err)
		}
		for j := range perTable {
			entry := be.Uint64(b[table+j*8:])
			if entry > 1 {
				if _, err := d.owns(entry); err != nil {
					return nil, fmt.Errorf("L2 entry %d of table %d: %w", j, i, err)
				}
			}
			if c := i*perTable + j; c < clusters {
				d.entries[c] = entry
			} else if entry != 0 {
				return nil, fmt.Errorf("L2 entry %d of table %d is behind the image", j, i)
			}
		}
	}
	return d, d.checkRefcounts()
}

// refer counts a reference to each of the clusters of n bytes at off.
func (d *decoded) refer(off, n int64) {
	for ; n > 0; off, n = off+d.cluster, n-d.cluster {
		d.references[off/d.cluster]++
	}
}

// owns returns the offset in an entry that alone refers to a cluster.
func (d *decoded) owns(entry uint64) (int64, error) {
	off := int64(entry &^ (1 << 63))
	if entry>>63 == 0 || off%d.cluster != 0 || off >= int64(len(d.b)) || off == 0 {
		return 0, fmt.Errorf("entry is %#x in a file of %d bytes", entry, len(d.b))
	}
	d.refer(off, 1)
	return off, nil
}

func (d *decoded) checkRefcounts() error {
	be := binary.BigEndian
	table, clusters := int64(be.Uint64(d.b[48:])), int64(be.Uint32(d.b[56:]))
	d.refer(table, clusters*d.cluster)
	var counts []uint16
	for i := range clusters * d.cluster / 8 {
		block := int64(be.Uint64(d.b[table+i*8:]))
		if block == 0 {
			continue
		}
		d.refer(block, d.cluster)
		for j := range d.cluster / 2 {
			counts = append(counts, be.Uint16(d.b[block+j*2:]))
		}
	}
	for i, n := range counts {
		want := uint16(0)
		if i < len(d.references) {
			want = 1
		}
		if n != want {
			return fmt.Errorf("refcount of cluster %d is %d, want %d", i, n, want)
		}
	}
	if len(counts) < len(d.references) {
		return fmt.Errorf("%d refcounts for %d clusters", len(counts), len(d.references))
	}
	for i, n := range d.references {
		if n != 1 {
			return fmt.Errorf("cluster %d is referred to %d times", i, n)
		}
	}
	return nil
}

// read returns the image over a backing file.
func (d *decoded) read(backing []byte) []byte {
	image := make([]byte, int64(len(d.entries))*d.cluster)
	copy(image, backing)
	for i, entry := range d.entries {
		c := image[int64(i)*d.cluster:][:d.cluster]
		switch entry {
		case 0:
		case 1:
			clear(c)
		default:
			copy(c, d.b[entry&^(1<<63):])
		}
	}
	return image[:d.size]
}

// content reads a whole file.
func content(f *File) ([]byte, error) {
	return io.ReadAll(io.NewSectionReader(f, 0, f.at.end))
}
