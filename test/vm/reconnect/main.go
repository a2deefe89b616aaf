// Command reconnect makes an export the disk /dev/nbdINDEX of the kernel's NBD client,
// and connects again whenever the server has gone. Requests wait meanwhile, for at most
// two minutes: the kernel can do that for who asks over netlink, as nbd-client does not
// (guest.sh). It runs until it is killed; the disk stays.
//
//	reconnect SOCKET EXPORT INDEX
package main

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"log"
	"net"
	"os"
	"strconv"
	"time"
)

const (
	// deadLimit is how long requests wait for a server, in seconds.
	deadLimit = 120

	// lostLimit is when a request that was sent over a connection that is dead, or does
	// not answer, is sent again over another: the kernel looks no sooner.
	lostLimit = 5
)

func main() {
	if len(os.Args) != 4 {
		log.Fatal("usage: reconnect SOCKET EXPORT INDEX")
	}
	index, err := strconv.ParseUint(os.Args[3], 10, 32)
	if err != nil {
		log.Fatal(err)
	}
	log.Fatal(keep(os.Args[1], os.Args[2], uint32(index)))
}

// keep connects the disk, and again when the kernel says that its connection is dead. It
// returns only with an error.
func keep(socket, export string, index uint32) error {
	nl, err := dialKernel()
	if err != nil {
		return err
	}
	c, err := dial(socket, export)
	if err != nil {
		return err
	}
	if err := nl.connect(index, c); err != nil {
		return fmt.Errorf("connect nbd%d: %w", index, err)
	}
	fmt.Println("connected")
	for {
		if err := nl.awaitDead(); err != nil {
			return err
		}
		c.file.Close()
		for c, err = dial(socket, export); err != nil; c, err = dial(socket, export) {
			time.Sleep(100 * time.Millisecond) // no server yet
		}
		if err := nl.reconnect(index, c); err != nil {
			return fmt.Errorf("connect nbd%d again: %w", index, err)
		}
		fmt.Println("connected again")
	}
}

// connection is one to an export, with which the kernel can go on.
type connection struct {
	file  *os.File
	size  uint64
	flags uint16
}

// What is sent in the handshake, by the NBD specification's names.
const (
	NBD_OPT_GO      = 7
	NBD_REP_ACK     = 1
	NBD_REP_INFO    = 3
	NBD_INFO_EXPORT = 0

	NBD_FLAG_C_FIXED_NEWSTYLE = 1 << 0
	NBD_FLAG_C_NO_ZEROES      = 1 << 1
)

// dial connects to an export of a server.
func dial(socket, export string) (connection, error) {
	conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Net: "unix", Name: socket})
	if err != nil {
		return connection{}, err
	}
	defer conn.Close()
	var c connection
	if err := c.handshake(conn, export); err != nil {
		return connection{}, err
	}
	c.file, err = conn.File() // which blocks, as the kernel wants it
	return c, err
}

func (c *connection) handshake(conn io.ReadWriter, export string) error {
	if _, err := io.ReadFull(conn, make([]byte, 18)); err != nil {
		return err
	}
	be := binary.BigEndian
	b := be.AppendUint32(nil, NBD_FLAG_C_FIXED_NEWSTYLE|NBD_FLAG_C_NO_ZEROES)
	b = append(b, "IHAVEOPT"...)
	b = be.AppendUint32(b, NBD_OPT_GO)
	b = be.AppendUint32(b, uint32(4+len(export)+2))
	b = be.AppendUint32(b, uint32(len(export)))
	b = append(b, export...)
	if _, err := conn.Write(be.AppendUint16(b, 0)); err != nil {
		return err
	}
	for {
		var head [20]byte
		if _, err := io.ReadFull(conn, head[:]); err != nil {
			return err
		}
		data := make([]byte, be.Uint32(head[16:]))
		if _, err := io.ReadFull(conn, data); err != nil {
			return err
		}
		switch kind := be.Uint32(head[12:]); {
		case kind == NBD_REP_ACK:
			return nil
		case kind == NBD_REP_INFO && be.Uint16(data) == NBD_INFO_EXPORT:
			c.size, c.flags = be.Uint64(data[2:]), be.Uint16(data[10:])
		case kind != NBD_REP_INFO:
			return fmt.Errorf("reply %#x to the option: %s", kind, bytes.TrimSpace(data))
		}
	}
}
