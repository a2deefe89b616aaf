// The bytes of the format.
//
// QEMU's docs/interop/qcow2.txt is the specification. All numbers are big-endian.
// The header, of version 3, is the first cluster:
//
//	offset  size  field                       here
//	     0     4  magic                       "QFI\xfb"
//	     4     4  version                     3
//	     8     8  backing file name: offset   after the extensions; 0: none
//	    16     4  backing file name: length   bytes
//	    20     4  cluster size                exponent of two
//	    24     8  size of the image           bytes
//	    32     4  encryption                  0: none
//	    36     4  L1 table: length            entries
//	    40     8  L1 table: offset
//	    48     8  refcount table: offset
//	    56     4  refcount table: length      clusters
//	    60     4  internal snapshots          0
//	    64     8  internal snapshots: offset  0
//	    72     8  incompatible features       0
//	    80     8  compatible features         0
//	    88     8  features cleared by others  0
//	    96     4  width of refcounts          4: exponent of two, in bits
//	   100     4  length of the header        104
//	   104     4  extension                   0xe2792aca: format of backing file
//	   108     4  its length                  3
//	   112     8  its content                 "raw", and zeroes
//	   120     8  end of extensions           zeroes
//	   128        backing file name
//
// Without a backing file the end of extensions is at 104 and nothing follows it.
//
// An entry of a table is 8 bytes. In the L1 table it is the offset of an L2 table,
// or 0 where all clusters of that are absent. In an L2 table it is the offset of a
// data cluster, 1 for a zero cluster, 0 for an absent one. An offset has the top
// bit set, which says that nothing else refers to the same cluster. The refcount
// table has the offset of each refcount block, and a block 2 bytes for each
// cluster of the file: 1, as everything is referred to once, and 0 beyond its end.

package qcow2

import "encoding/binary"

const (
	minShift = 12 // of the smallest cluster: 4 KiB
	maxShift = 21 // of the largest: 2 MiB

	wordSize     = 8 // of an entry of any table, bytes
	refcountSize = 2 // of a refcount, bytes

	// maxRefTable is the largest refcount table with which QEMU opens a file, in
	// bytes. Its limit of 32 MiB for the L1 table is never met before that.
	maxRefTable = 8 << 20

	// owned says in an entry that it alone refers to the cluster.
	owned = 1 << 63

	// zeroEntry is the L2 entry of a zero cluster.
	zeroEntry = 1

	headerSize    = 104
	backingFormat = 0xe2792aca
)

// header returns the first bytes of the file.
func (d Disk) header(p plan) []byte {
	var name uint64 // offset of the backing file's name
	if d.Backing != "" {
		name = headerSize + 24
	}
	b := []byte{'Q', 'F', 'I', 0xfb}
	b = put32(b, 3)
	b = put64(b, name)
	b = put32(b, uint32(len(d.Backing)))
	b = put32(b, uint32(p.shift))
	b = put64(b, uint64(d.Size))
	b = put32(b, 0)
	b = put32(b, uint32(p.l1Entries))
	b = put64(b, uint64(p.l1))
	b = put64(b, uint64(p.refTable))
	b = put32(b, uint32((p.refBlocks-p.refTable)>>p.shift))
	b = append(b, make([]byte, 36)...)
	b = put32(b, 4)
	b = put32(b, headerSize)
	if d.Backing == "" {
		return put64(b, 0)
	}
	b = put32(b, backingFormat)
	b = put32(b, 3)
	b = append(b, "raw\x00\x00\x00\x00\x00"...)
	b = put64(b, 0)
	return append(b, d.Backing...)
}

func put32(b []byte, v uint32) []byte { return binary.BigEndian.AppendUint32(b, v) }
func put64(b []byte, v uint64) []byte { return binary.BigEndian.AppendUint64(b, v) }
